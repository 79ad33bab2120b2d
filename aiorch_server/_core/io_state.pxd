# The records of an I/O thread: itself, its connections, what epoll gives back. See io_loop.pxd for the whole.
#
# Nothing here is allocated or locked by itself: everything belongs to the thread, but for what is said to be atomic.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t

from aiorch_server._core.crossing cimport Crossing, Event, Link, sockaddr_storage, socklen_t
from aiorch_server._core.h2_stream cimport MAX_OUTLET_PIECES, Connection, Group, Outlet, iovec
from aiorch_server._core.loans cimport Loan
from aiorch_server._core.request cimport CompletionSink
from aiorch_server._core.routes cimport RouteReader, RouterState
from aiorch_server._core.timers cimport Timer, TimerHeap
from aiorch_server._core.transport cimport PortSecurity, Transport


cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        void *ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll_fd, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll_fd, epoll_event *events, int size, int timeout_ms)
    int EPOLL_CLOEXEC
    int EPOLL_CTL_ADD
    int EPOLL_CTL_MOD
    int EPOLL_CTL_DEL
    uint32_t EPOLLIN
    uint32_t EPOLLOUT
    uint32_t EPOLLERR
    uint32_t EPOLLHUP


cdef enum WatchedKind:
    WATCHED_COMMANDS = 0
    WATCHED_SINK = 1
    WATCHED_LISTENER = 2
    WATCHED_CONNECTION = 3


cdef enum:
    RECEIVE_BYTES = 262144
    TAIL_BYTES = 16384              # behind the receive buffer: what follows the messages in a landing
    SEND_BYTES = 262144


cdef struct Watched:                # what epoll gives back
    WatchedKind kind
    int fd


cdef struct Listener:
    Watched watched                 # the descriptor is owned
    PortSecurity *security          # a reference; NULL: plaintext
    Listener *next


cdef struct Unsent:
    int at                          # the first piece that is left
    int n
    iovec pieces[MAX_OUTLET_PIECES]
    Loan *loans[MAX_OUTLET_PIECES]  # one reference each, or NULL
    uint8_t *copy                   # a buffer, owned: what was not lent


cdef struct IoConnection:
    Watched watched                 # the descriptor is owned
    IoState *io
    Connection *session
    Transport *transport            # owned; NULL: plaintext
    IoConnection *older
    IoConnection *newer
    IoConnection *next_dirty
    bint is_dirty
    bint must_close
    bint has_ended                  # the client sends no more: close once what can be written at once is written
    bint is_write_blocked
    uint32_t interest               # what epoll watches for
    size_t read_bytes               # for the next read: little, where bytes cost much
    Unsent *unsent                  # owned: collected and not taken by the socket
    size_t greeting_bytes           # received while the client preface is awaited
    Timer greeting
    Timer stall
    Link *links                     # of calls that the asyncio plane has not ended
    size_t orphan_bytes             # what it still holds of calls that are over
    sockaddr_storage peer
    socklen_t peer_size


cdef struct IoState:
    int epoll_fd
    Crossing *crossing
    CompletionSink *sink
    RouterState *router             # a reference, or NULL: then every call is a slow one
    RouteReader reader
    Group *group
    TimerHeap timers                # of connections; those of streams are the group's
    Watched commands_watched
    Watched sink_watched
    Listener *listeners
    IoConnection *connections
    IoConnection *dirty
    Event *events_head              # of this round
    Event *events_tail
    Event idle
    uint8_t *receive_buffer
    Outlet outlet                   # over the send buffer, which it owns
    uint8_t *wire_buffer            # ciphertext that was just received, or is about to be sent; NULL: plaintext only
    int handshakes_left             # in this round
    int64_t greeting_timeout_ns
    int64_t write_timeout_ns
    int64_t accept_at_ns            # 0: accepting; else nobody is accepted until then
    int64_t finish_drain_ns         # 0: not draining, or done
    size_t lost_bytes               # what the asyncio plane holds of calls whose connection is closed
    int64_t n_connections
    bint is_draining
    bint is_idle_told
    bint is_stopping
    # atomic: for the other threads
    size_t shown_connections
    size_t shown_in_flight


cdef inline int watch(IoState *io, Watched *watched, uint32_t interest, int operation) noexcept nogil:
    cdef epoll_event event
    event.events = interest
    event.data.ptr = watched
    return epoll_ctl(io.epoll_fd, operation, watched.fd, &event)


cdef inline void mark_dirty(IoConnection *connection) noexcept nogil:
    if not connection.is_dirty:
        connection.is_dirty = True
        connection.next_dirty = connection.io.dirty
        connection.io.dirty = connection


cdef inline void doom(IoConnection *connection) noexcept nogil:
    """It is closed at the round's end."""
    connection.must_close = True
    mark_dirty(connection)
