"""What all connections of a server share; see h2_ledger.pxd."""

from libc.stdlib cimport calloc, free

from aiorch_server._core.request cimport aiorch_add_reference


cdef void retain_ledger(Ledger *ledger) noexcept nogil:
    if ledger != NULL:
        aiorch_add_reference(&ledger.references, 1)


cdef void release_ledger(Ledger *ledger) noexcept nogil:
    if ledger != NULL and aiorch_add_reference(&ledger.references, -1) == 0:
        free(ledger)


cdef bint take_place(Ledger *ledger) noexcept nogil:
    if ledger == NULL:
        return True
    if aiorch_add_count(&ledger.connections, 1) > ledger.max_connections and ledger.max_connections:
        aiorch_add_count(&ledger.connections, -1)
        aiorch_add_count(&ledger.refused_connections, 1)
        return False
    return True


cdef void give_place(Ledger *ledger) noexcept nogil:
    if ledger != NULL:
        aiorch_add_count(&ledger.connections, -1)


cdef bint has_place(Ledger *ledger) noexcept nogil:
    if (ledger == NULL or ledger.max_connections == 0
            or aiorch_load_count(&ledger.connections) < ledger.max_connections):
        return True
    aiorch_add_count(&ledger.refused_connections, 1)
    return False


cdef class ServerLedger:
    """The bounds that all drivers of one server keep together, and the counts behind them; 0 is no bound.

    ``max_bytes`` holds for request messages that no queue has yet and answers that no socket has yet. ValueError below 0.
    """

    def __cinit__(self, *, int64_t max_bytes=0, int64_t max_connections=0):
        if max_bytes < 0 or max_connections < 0:
            raise ValueError("bounds of a server are 0 (none) or more")
        self.ledger = <Ledger *> calloc(1, sizeof(Ledger))
        if self.ledger == NULL:
            raise MemoryError
        self.ledger.references = 1
        self.ledger.max_bytes, self.ledger.max_connections = max_bytes, max_connections

    def __dealloc__(self):
        release_ledger(self.ledger)

    @property
    def bytes(self):
        """Bytes held now, right to 1 MiB per thread."""
        return aiorch_load_count(&self.ledger.bytes)

    @property
    def connections(self):
        """Open connections."""
        return aiorch_load_count(&self.ledger.connections)

    @property
    def refused_messages(self):
        """Messages refused because the server held too many bytes."""
        return aiorch_load_count(&self.ledger.refused_messages)

    @property
    def refused_connections(self):
        """Connections closed at once because there were too many."""
        return aiorch_load_count(&self.ledger.refused_connections)
