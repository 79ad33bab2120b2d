"""Rows for tensors that will probably run together; see slabs.pxd for the contract."""

from libc.string cimport memset

from aiorch_server._core.buffers cimport (
    ALIGNMENT_BYTES,
    POOLED_TO_BYTES,
    Place,
    count_references,
    drop_buffer,
    hold_buffer,
    new_slab_buffer,
)


cdef enum:
    LEAST_USUAL_ROWS = 24       # one and a half


cdef inline int64_t _expect_rows(const Slab *slab) noexcept nogil:
    return (slab.usual_rows + USUAL_SCALE - 1) // USUAL_SCALE


cdef void note_batch(Slab *slab, int64_t rows) noexcept nogil:
    cdef int64_t more = rows * USUAL_SCALE - slab.usual_rows
    slab.usual_rows += more // 2 if more > 0 else more // 4     # too many rows cost less than too few
    slab.is_batch_over = True


cdef uint8_t *empty_slab(Slab *slab) noexcept nogil:
    cdef uint8_t *buffer = slab.buffer
    slab.buffer = NULL
    return buffer


cdef uint8_t *relax_slab(Slab *slab) noexcept nogil:
    return empty_slab(slab) if slab.buffer != NULL and count_references(slab.buffer) == 1 else NULL


cdef bint reserve_rows(Slab *slab, size_t row_bytes, int64_t rows, Place *place, uint8_t **dropped) noexcept nogil:
    cdef int64_t most, expected, n_rows
    dropped[0] = NULL
    if row_bytes == 0 or row_bytes % ALIGNMENT_BYTES or slab.usual_rows < LEAST_USUAL_ROWS:
        return False
    most = <int64_t> (<size_t> POOLED_TO_BYTES // row_bytes)
    expected = min(_expect_rows(slab), most)
    if rows > most or most < 2:
        return False
    if slab.buffer != NULL:
        if count_references(slab.buffer) == 1:      # only ours: references come from others' or from here
            slab.n_given, slab.is_batch_over = 0, True
        # a batch that begins here shall fit, one that has begun goes on as far as there is room
        if (slab.row_bytes != row_bytes or slab.n_given + rows > slab.n_rows
                or slab.is_batch_over and slab.n_rows - slab.n_given < expected):
            dropped[0] = empty_slab(slab)
    if slab.buffer == NULL:
        # the size of the last one, if it will do: then its memory is there again
        n_rows = min(max(expected, rows), most)
        if slab.row_bytes == row_bytes and n_rows <= slab.n_rows <= 2 * n_rows:
            n_rows = slab.n_rows
        slab.buffer = new_slab_buffer(<size_t> n_rows * row_bytes)
        if slab.buffer == NULL:
            return False
        slab.row_bytes, slab.n_rows, slab.n_given = row_bytes, n_rows, 0
    slab.is_batch_over = False
    hold_buffer(slab.buffer)
    place.buffer, place.data = slab.buffer, slab.buffer + <size_t> slab.n_given * row_bytes
    slab.n_given += rows
    return True


cdef class SlabProbe:
    """A slab as unit tests see it; the test plays the scheduler and those who have rows."""

    cdef Slab slab
    cdef list buffers           # addresses of those with rows, each with a reference

    def __cinit__(self):
        memset(&self.slab, 0, sizeof(Slab))
        self.buffers = []

    def __dealloc__(self):
        drop_buffer(empty_slab(&self.slab))
        for address in self.buffers or ():
            drop_buffer(<uint8_t *> <size_t> address)

    def note_batch(self, int64_t rows):
        """A batch of that many rows was taken."""
        note_batch(&self.slab, rows)

    def reserve(self, size_t row_bytes, int64_t rows):
        """``(slab, data)``, both addresses: where the rows lie; None where there are none."""
        cdef Place place
        cdef uint8_t *dropped
        cdef bint is_reserved = reserve_rows(&self.slab, row_bytes, rows, &place, &dropped)
        drop_buffer(dropped)
        if not is_reserved:
            return None
        memset(place.data, 1, row_bytes * <size_t> rows)
        self.buffers.append(<size_t> place.buffer)
        return <size_t> place.buffer, <size_t> place.data

    def let_go(self, size_t buffer):
        """Gives the reference of one reservation back."""
        self.buffers.remove(buffer)
        drop_buffer(<uint8_t *> buffer)

    def relax(self):
        """Lets go of memory that nobody has rows in."""
        drop_buffer(relax_slab(&self.slab))
