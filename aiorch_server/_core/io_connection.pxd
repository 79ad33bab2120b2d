# One connection of an I/O thread: its socket, what is read and written, and how it begins and ends.

from libc.stdint cimport int64_t

from aiorch_server._core.crossing cimport sockaddr_storage, socklen_t
from aiorch_server._core.io_state cimport IoConnection, IoState
from aiorch_server._core.transport cimport PortSecurity


# Takes over the descriptor (not blocking); `security` is NULL for plaintext. -1: no memory, it is closed.
cdef int open_io_connection(IoState *io, int fd, PortSecurity *security, const sockaddr_storage *peer,
                            socklen_t peer_size, int64_t now) noexcept nogil
# Reads what is there, but not for ever, and feeds the session: big messages of plaintext straight into their place.
cdef void receive(IoConnection *connection, int64_t now) noexcept nogil
# The last step of a round: tells the asyncio plane, writes, and closes the connection if it must go.
cdef void end_turn(IoConnection *connection) noexcept nogil
