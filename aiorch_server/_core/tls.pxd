# TLS 1.2 and 1.3 on the I/O threads, over the system's OpenSSL 3: the Transport behind a secure port.
#
# Contract: the thread's functions are reached through PortSecurity's table alone; they need no interpreter lock and
# never wait. OpenSSL sees no socket: received bytes are put under its reading side (a BIO of ours), and what it writes
# goes into the thread's buffer, or, while a handshake is answered, into the transport's own. So a read takes all that
# has come, a write takes all it is given, neither has to be tried again, and one send(2) carries many records.
#
# The error queue is the thread's: it is cleared before each call whose result is looked at.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

from aiorch_server._core.openssl cimport SSL, SSL_CTX
from aiorch_server._core.request cimport pthread_mutex_t
from aiorch_server._core.transport cimport PortSecurity, Transport


cdef struct TlsSecurity:
    PortSecurity base
    pthread_mutex_t lock            # of the pointer: taken for each new connection, and to put another context there
    SSL_CTX *context                # shared by all threads, and not changed itself any more


cdef struct TlsTransport:
    Transport base
    SSL *ssl
    bint is_broken                  # a fatal error: nothing may be said any more but what `out` holds
    # where OpenSSL reads, while receive() runs
    const uint8_t *wire_in
    size_t wire_in_size
    # where it writes, while seal() runs; NULL: then to `out`
    uint8_t *wire_out
    size_t wire_out_size
    size_t wire_out_capacity
    # owned: of handshakes and alerts, until the next seal()
    uint8_t *out
    size_t out_size
    size_t out_capacity


cdef class TlsContext:
    cdef TlsSecurity *security      # a reference

    cdef int set_key(self, bytes pem) except -1
    cdef int add_certificates(self, bytes pem, str what, bint are_roots) except -1
