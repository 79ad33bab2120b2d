# What stands between a socket and a session where bytes do not travel as they are; TLS is the only one (tls.pyx).
#
# A plaintext connection has no Transport (NULL) and pays nothing. The I/O thread knows no more than this header: it
# runs where the package was built without OpenSSL, and does not load it where no port asks for it.
#
# Ownership: a PortSecurity is counted: by the object that made it, each listener, each transport. A Transport belongs
# to its connection. A PeerIdentity never changes and is counted: by its transport, and by each slow call, on any thread.
#
# Threads: a Transport belongs to the thread of its connection; many threads may use one PortSecurity.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from aiorch_server._core.request cimport aiorch_add_reference


cdef enum:
    WIRE_SLACK_BYTES = 32768    # what may wait inside a transport and come on top of what one call brings
    NOTHING_YET = -2            # of receive()


cdef struct PeerIdentity:           # what a connection's handshake has proved
    int references
    bint is_resumed                 # of an earlier session, which had proved it
    uint8_t *certificate            # DER, owned; NULL: the client has shown none
    size_t certificate_size


cdef struct Transport:              # of one connection; its maker's record begins with it
    PortSecurity *security          # a reference
    PeerIdentity *identity          # owned reference; NULL until is_open
    bint is_open                    # the handshake is over: now there is something to feed and to collect
    bint has_ended                  # the client has said that it sends no more
    bint has_more                   # the last receive() got as much as it asked for


cdef struct PortSecurity:
    int references
    # A transport for a connection just accepted, with a reference of its own; NULL: no memory.
    Transport *(*open)(PortSecurity *security) noexcept nogil
    # Reads from the socket once, at most wire_size bytes, and gives the plain bytes that come of it, all of them:
    # nothing that a later event would have to fetch stays inside. 0: the end; NOTHING_YET: nothing for the session;
    # -1: the connection must be closed. `plain` has room for wire_size + WIRE_SLACK_BYTES.
    Py_ssize_t (*receive)(Transport *transport, int fd, uint8_t *wire, size_t wire_size,
                          uint8_t *plain) noexcept nogil
    # What goes to the socket for these plain bytes (none: only what the transport itself has to say), in front of
    # `wire`, which has room for size + WIRE_SLACK_BYTES; its size, or -1: broken.
    Py_ssize_t (*seal)(Transport *transport, const uint8_t *plain, size_t size, uint8_t *wire) noexcept nogil
    # Frees it. When nothing half sent stands in the way, says goodbye first, if the socket takes that at once.
    void (*close)(Transport *transport, int fd, bint may_write) noexcept nogil
    void (*free)(PortSecurity *security) noexcept nogil


cdef inline PortSecurity *retain_security(PortSecurity *security) noexcept nogil:
    aiorch_add_reference(&security.references, 1)
    return security


cdef inline void release_security(PortSecurity *security) noexcept nogil:
    if aiorch_add_reference(&security.references, -1) == 0:
        security.free(security)


# With a copy of the certificate and one reference; NULL: no memory.
cdef inline PeerIdentity *new_identity(const uint8_t *certificate, size_t size) noexcept nogil:
    cdef PeerIdentity *identity = <PeerIdentity *> calloc(1, sizeof(PeerIdentity))
    if identity == NULL:
        return NULL
    identity.references, identity.certificate_size = 1, size
    identity.certificate = <uint8_t *> malloc(size)
    if identity.certificate == NULL:
        free(identity)
        return NULL
    memcpy(identity.certificate, certificate, size)
    return identity


cdef inline PeerIdentity *retain_identity(PeerIdentity *identity) noexcept nogil:
    if identity != NULL:
        aiorch_add_reference(&identity.references, 1)
    return identity


cdef inline void release_identity(PeerIdentity *identity) noexcept nogil:
    if identity != NULL and aiorch_add_reference(&identity.references, -1) == 0:
        free(identity.certificate)
        free(identity)
