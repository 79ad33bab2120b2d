# The I/O thread of the gRPC door: epoll over sockets, around the same sessions (h2) as the asyncio driver's.
#
# Contract: nothing here needs the interpreter lock, nor a lock held by anybody who waits for it. One thread runs
# run_loop(); everything in an IoState belongs to it from then until run_loop() returns, but for `crossing`, which two
# sides use, and what is said to be atomic.
#
# A round: wait; commands, answers, bytes, deadlines; dispatch what is complete and wake the instances once; then, for
# each connection that something happened to, tell the asyncio plane and write once. A connection that must go is only
# marked (`must_close`) and goes at the round's end, so no pointer of the round is ever stale.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t

from aiorch_server._core.h2_stream cimport Limits
from aiorch_server._core.io_state cimport IoState
from aiorch_server._core.routes cimport RouterState
from aiorch_server._core.transport cimport PortSecurity


# NULL when memory or descriptors ran out. `router` may be NULL.
cdef IoState *new_io(const Limits *limits, const uint8_t *fast_path, size_t fast_path_size, RouterState *router,
                     int64_t greeting_timeout_ns, int64_t write_timeout_ns) noexcept nogil
# Before the thread runs. Takes over a listening descriptor (not blocking), and keeps a reference to `security` (NULL:
# plaintext). -1: no memory, or it could not be watched; it is closed.
cdef int add_listener(IoState *io, int fd, PortSecurity *security) noexcept nogil
# Stops listening; nothing where that has happened.
cdef void close_listeners(IoState *io) noexcept nogil
# The thread. When it returns, all connections are closed; requests in flight still come back through the sink.
cdef void run_loop(IoState *io) noexcept nogil
# Takes back what has come through the sink after the thread ended.
cdef void settle_late(IoState *io) noexcept nogil
# Only when the thread has ended, or never began.
cdef void free_io(IoState *io) noexcept nogil
