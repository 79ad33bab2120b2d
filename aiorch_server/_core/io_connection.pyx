"""One connection of an I/O thread; see io_connection.pxd."""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from aiorch_server._core.buffers cimport COPY_SENT, count_copied, drop_buffer, new_buffer
from aiorch_server._core.crossing cimport Link
from aiorch_server._core.h2 cimport *
from aiorch_server._core.h2_ledger cimport has_place
from aiorch_server._core.h2_life cimport balance_books, begin_life
from aiorch_server._core.h2_landing cimport *
from aiorch_server._core.h2_stream cimport Limits, Outlet
from aiorch_server._core.loans cimport drop_loan
from aiorch_server._core.io_plane cimport tell_events
from aiorch_server._core.io_state cimport *
from aiorch_server._core.request cimport now_ns
from aiorch_server._core.timers cimport clear_timer, set_timer
from aiorch_server._core.transport cimport (
    NOTHING_YET,
    WIRE_SLACK_BYTES,
    PortSecurity,
    Transport,
    retain_identity,
)

cdef extern from "<sys/socket.h>" nogil:
    Py_ssize_t recv(int fd, void *buffer, size_t size, int flags)
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    Py_ssize_t sendmsg(int fd, const msghdr *message, int flags)
    Py_ssize_t send(int fd, const void *buffer, size_t size, int flags)
    int shutdown(int fd, int how)
    int setsockopt(int fd, int level, int option, const void *value, socklen_t size)
    int AF_UNIX
    int SOL_SOCKET
    int SO_KEEPALIVE
    int MSG_NOSIGNAL
    int SHUT_RDWR

cdef extern from "<netinet/in.h>" nogil:
    int IPPROTO_TCP

cdef extern from "<netinet/tcp.h>" nogil:
    int TCP_NODELAY

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef enum:
    FIRST_READ_BYTES = 16384
    LEAST_READ_BYTES = 2048
    SEND_BYTES_PER_ROUND = 1048576      # to one connection: then it is the others' turn
    READ_SLICE_NS = 5000000             # a read that took longer to understand is followed by a smaller one
    GREETING_BYTES = 33                 # client preface and the header of its SETTINGS frame


cdef int open_io_connection(IoState *io, int fd, PortSecurity *security, const sockaddr_storage *peer,
                            socklen_t peer_size, int64_t now) noexcept nogil:
    """Takes over the descriptor; -1: no memory, it is closed."""
    cdef IoConnection *connection
    cdef int yes = 1
    if not has_place(io.group.ledger):
        close(fd)
        return 0
    connection = <IoConnection *> calloc(1, sizeof(IoConnection))
    if connection == NULL:
        close(fd)
        return -1
    connection.io, connection.peer, connection.peer_size = io, peer[0], peer_size
    connection.watched.kind, connection.watched.fd = WATCHED_CONNECTION, fd
    connection.interest, connection.read_bytes = EPOLLIN, FIRST_READ_BYTES
    connection.session = open_connection(io.group, connection)
    if security != NULL:
        connection.transport = security.open(security)
    if (connection.session == NULL or (security != NULL and connection.transport == NULL)
            or begin_life(connection.session, now) < 0
            or set_timer(&io.timers, &connection.greeting, now + io.greeting_timeout_ns, connection) < 0
            or watch(io, &connection.watched, EPOLLIN, EPOLL_CTL_ADD) < 0):
        clear_timer(&io.timers, &connection.greeting)
        if connection.session != NULL:
            close_connection(connection.session)
            free_connection(connection.session)
        close_transport(connection)
        close(fd)
        free(connection)
        return -1
    if peer.ss_family != AF_UNIX:
        setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof(yes))
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes))
    connection.older = io.connections
    if connection.older != NULL:
        connection.older.newer = connection
    io.connections = connection
    io.n_connections += 1
    if io.is_draining:
        drain_connection(connection.session)
    mark_dirty(connection)
    return 0


cdef void close_transport(IoConnection *connection) noexcept nogil:
    if connection.transport != NULL:
        connection.transport.security.close(
            connection.transport, connection.watched.fd, connection.unsent == NULL and not connection.is_write_blocked)


cdef void destroy_connection(IoConnection *connection) noexcept nogil:
    cdef IoState *io = connection.io
    cdef Link *link
    close_connection(connection.session)
    tell_events(connection)
    free_connection(connection.session)
    while connection.links != NULL:
        link = connection.links
        connection.links = link.older
        link.connection = NULL
        link.older = link.newer = NULL
    io.lost_bytes += connection.orphan_bytes        # each of those calls is over
    clear_timer(&io.timers, &connection.greeting)
    clear_timer(&io.timers, &connection.stall)
    close_transport(connection)
    # A forked child may hold the socket too: then closing alone would neither end the watch nor tell the client.
    watch(io, &connection.watched, 0, EPOLL_CTL_DEL)
    shutdown(connection.watched.fd, SHUT_RDWR)
    close(connection.watched.fd)
    free_unsent(connection)
    if connection.newer != NULL:
        connection.newer.older = connection.older
    else:
        io.connections = connection.older
    if connection.older != NULL:
        connection.older.newer = connection.newer
    io.n_connections -= 1
    free(connection)


cdef Py_ssize_t receive_sealed(IoConnection *connection) noexcept nogil:
    """Plain bytes in the receive buffer; see PortSecurity.receive."""
    cdef IoState *io = connection.io
    cdef Transport *transport = connection.transport
    cdef Py_ssize_t size
    if not transport.is_open:
        if io.handshakes_left == 0:
            return NOTHING_YET          # the next round comes at once
        io.handshakes_left -= 1
    size = transport.security.receive(
        transport, connection.watched.fd, io.wire_buffer,
        min(connection.read_bytes, <size_t> (RECEIVE_BYTES - WIRE_SLACK_BYTES)), io.receive_buffer)
    connection.has_ended = transport.has_ended
    if connection.session.identity == NULL:
        connection.session.identity = retain_identity(transport.identity)
    mark_dirty(connection)              # it may have something to say itself
    return size


cdef void receive(IoConnection *connection, int64_t now) noexcept nogil:
    cdef Py_ssize_t size = 0
    cdef size_t total = 0
    while total < RECEIVE_BYTES:
        size = receive_landing(connection, now) if connection.transport == NULL else 0
        if size == 0:
            if total:
                return
            size = receive_linear(connection, now)
        if size <= 0:
            return
        total += <size_t> size


cdef Py_ssize_t receive_landing(IoConnection *connection, int64_t now) noexcept nogil:
    """Reads the messages that are coming in where they belong. 0: there are none; -1: nothing more to read now."""
    cdef IoState *io = connection.io
    cdef Landing landing
    cdef Py_ssize_t size
    cdef bint is_full
    if plan_landing(connection.session, &landing, io.receive_buffer + RECEIVE_BYTES, TAIL_BYTES) == 0:
        return 0
    size = readv(connection.watched.fd, landing.pieces, landing.n)
    if size <= 0:
        end_receiving(connection, size)     # first: it looks at errno
        clear_landing(&landing)
        return -1
    is_full = <size_t> size >= landing.size
    mark_dirty(connection)
    if feed_landing(connection.session, &landing, <size_t> size, io.receive_buffer, now) < 0:
        doom(connection)
        return -1
    return size if is_full else -1


cdef Py_ssize_t receive_linear(IoConnection *connection, int64_t now) noexcept nogil:
    """Reads once into the shared buffer. Bytes where a message goes on behind them, else -1: enough for this turn."""
    cdef IoState *io = connection.io
    cdef Py_ssize_t size
    cdef bint has_more
    if connection.transport == NULL:
        size = recv(connection.watched.fd, io.receive_buffer, connection.read_bytes, 0)
        has_more = size == <Py_ssize_t> connection.read_bytes
        if size <= 0:
            end_receiving(connection, size)
            return -1
    else:
        size = receive_sealed(connection)
        has_more = connection.transport.has_more
        if size == NOTHING_YET:
            resize_reads(connection, has_more, now)
            return -1
        if size < 0:
            doom(connection)
            return -1
        if size == 0:
            connection.has_ended = True
            return -1
    mark_dirty(connection)
    if feed(connection.session, io.receive_buffer, <size_t> size, now) < 0:
        doom(connection)
        return -1
    if connection.greeting.place:
        connection.greeting_bytes += <size_t> size
        if connection.greeting_bytes >= GREETING_BYTES:
            clear_timer(&io.timers, &connection.greeting)
    if connection.transport == NULL and has_more and awaits_landing(connection.session):
        # Only what comes before the messages is read here: what is read of them must be copied.
        connection.read_bytes = FIRST_READ_BYTES
        return size
    resize_reads(connection, has_more, now)
    return -1


cdef void resize_reads(IoConnection *connection, bint has_more, int64_t now) noexcept nogil:
    """Small frames that cost much must not hold up the other connections."""
    cdef int64_t spent_ns
    if not has_more:
        return
    spent_ns = now_ns() - now
    if spent_ns > READ_SLICE_NS:
        connection.read_bytes = max(connection.read_bytes // 4, <size_t> LEAST_READ_BYTES)
    elif connection.read_bytes < RECEIVE_BYTES:
        connection.read_bytes *= 2


cdef void end_receiving(IoConnection *connection, Py_ssize_t result) noexcept nogil:
    """What a read means that gave nothing."""
    if result == 0:
        connection.has_ended = True     # a client that only listens is of no use to HTTP/2
        mark_dirty(connection)
    elif errno != EAGAIN and errno != EINTR:
        doom(connection)


cdef Py_ssize_t send_pieces(IoConnection *connection, iovec *pieces, int n) noexcept nogil:
    """Bytes that the socket took, 0 when it is full, -1 when it is broken."""
    cdef msghdr message
    cdef Py_ssize_t taken
    if n == 1:
        taken = send(connection.watched.fd, pieces[0].iov_base, pieces[0].iov_len, MSG_NOSIGNAL)
    else:
        memset(&message, 0, sizeof(message))
        message.msg_iov, message.msg_iovlen = pieces, <size_t> n
        taken = sendmsg(connection.watched.fd, &message, MSG_NOSIGNAL)
    if taken >= 0:
        return taken
    return 0 if errno == EAGAIN or errno == EINTR else -1


cdef Py_ssize_t fill_outlet(IoConnection *connection) noexcept nogil:
    """What the socket gets next, in the thread's outlet; its size, 0: there is nothing, -1: broken."""
    cdef IoState *io = connection.io
    cdef Outlet *outlet = &io.outlet
    cdef Transport *transport = connection.transport
    cdef Py_ssize_t size = 0
    if transport == NULL:
        return collect_pieces(connection.session, outlet)
    if transport.is_open:
        size = collect(connection.session, outlet.buffer, SEND_BYTES)
    if size < 0:
        return -1
    size = transport.security.seal(transport, outlet.buffer, <size_t> size, io.wire_buffer)
    if size > 0:
        outlet.pieces[0].iov_base, outlet.pieces[0].iov_len = io.wire_buffer, <size_t> size
        outlet.loans[0] = NULL
        outlet.n = 1
    return size


cdef void free_unsent(IoConnection *connection) noexcept nogil:
    cdef Unsent *unsent = connection.unsent
    connection.unsent = NULL
    if unsent == NULL:
        return
    for i in range(unsent.at, unsent.n):
        if unsent.loans[i] != NULL:
            drop_loan(unsent.loans[i])
    drop_buffer(unsent.copy)
    free(unsent)


cdef int send_unsent(IoConnection *connection) noexcept nogil:
    """What an earlier round left; -1: broken."""
    cdef Unsent *unsent = connection.unsent
    cdef iovec *piece
    cdef size_t n
    cdef Py_ssize_t taken = send_pieces(connection, &unsent.pieces[unsent.at], unsent.n - unsent.at)
    if taken < 0:
        return -1
    while taken > 0:
        piece = &unsent.pieces[unsent.at]
        n = min(piece.iov_len, <size_t> taken)
        taken -= <Py_ssize_t> n
        piece.iov_base, piece.iov_len = <uint8_t *> piece.iov_base + n, piece.iov_len - n
        if piece.iov_len == 0:
            if unsent.loans[unsent.at] != NULL:
                drop_loan(unsent.loans[unsent.at])
            unsent.at += 1
    if unsent.at < unsent.n:
        connection.is_write_blocked = True
        return 0
    free_unsent(connection)
    clear_timer(&connection.io.timers, &connection.stall)
    return 0


cdef int keep_unsent(IoConnection *connection, Outlet *outlet, size_t taken) noexcept nogil:
    """The socket is full: keeps what it did not take, and expects the client to take it in time. -1: no memory."""
    cdef IoState *io = connection.io
    cdef Unsent *unsent = <Unsent *> malloc(sizeof(Unsent))
    cdef iovec *piece
    cdef size_t own_bytes = 0, n
    if unsent == NULL:
        return -1
    connection.unsent = unsent
    unsent.at = unsent.n = 0
    unsent.copy = NULL
    for i in range(outlet.n):
        piece = &outlet.pieces[i]
        n = min(piece.iov_len, taken)
        taken -= n
        if piece.iov_len == n:
            continue
        unsent.pieces[unsent.n].iov_base = <uint8_t *> piece.iov_base + n
        unsent.pieces[unsent.n].iov_len = piece.iov_len - n
        unsent.loans[unsent.n], outlet.loans[i] = outlet.loans[i], NULL
        if unsent.loans[unsent.n] == NULL:
            own_bytes += piece.iov_len - n
        unsent.n += 1
    if own_bytes:
        unsent.copy = new_buffer(own_bytes, 0)
        if unsent.copy == NULL:
            return -1
        own_bytes = 0
        for i in range(unsent.n):
            piece = &unsent.pieces[i]
            if unsent.loans[i] == NULL:
                memcpy(unsent.copy + own_bytes, piece.iov_base, piece.iov_len)
                piece.iov_base = unsent.copy + own_bytes
                own_bytes += piece.iov_len
        count_copied(COPY_SENT, own_bytes)
    connection.is_write_blocked = True
    return set_timer(&io.timers, &connection.stall, now_ns() + io.write_timeout_ns, connection)


cdef int flush(IoConnection *connection) noexcept nogil:
    """Writes what the session has to say, until the socket is full; -1: broken."""
    cdef IoState *io = connection.io
    cdef Outlet *outlet = &io.outlet
    cdef Py_ssize_t size, taken
    cdef size_t total = 0
    cdef int result
    if connection.is_write_blocked:
        balance_books(connection.session)       # nobody collects the answers that come meanwhile
        return 0
    if connection.unsent == NULL:
        clear_timer(&io.timers, &connection.stall)
    elif send_unsent(connection) < 0:
        return -1
    while not connection.is_write_blocked:
        size = fill_outlet(connection)
        if size <= 0:
            return <int> size
        taken = send_pieces(connection, outlet.pieces, outlet.n)
        result = -1 if taken < 0 else 0
        if 0 <= taken < size:
            result = keep_unsent(connection, outlet, <size_t> taken)
        clear_outlet(outlet)
        if result < 0:
            return -1
        total += <size_t> size
        if total >= SEND_BYTES_PER_ROUND and connection.unsent == NULL:
            # the next round comes at once, but where the socket is full by chance
            connection.is_write_blocked = True
            return set_timer(&io.timers, &connection.stall, now_ns() + io.write_timeout_ns, connection)
    return 0


cdef void watch_connection(IoConnection *connection) noexcept nogil:
    """Asks epoll for what is wanted now: a client that takes no answers, or gives up too many calls, is not read."""
    cdef Limits *limits = &connection.io.group.limits
    cdef uint32_t interest = EPOLLIN
    if (connection.is_write_blocked and connection.session.outbound_bytes > limits.max_outbound_bytes
            or connection.orphan_bytes > limits.max_buffered_bytes):
        interest = 0
    connection.session.life.is_unread = interest == 0
    if connection.is_write_blocked:
        interest |= EPOLLOUT
    if interest != connection.interest:
        connection.interest = interest
        if watch(connection.io, &connection.watched, interest, EPOLL_CTL_MOD) < 0:
            connection.must_close = True


cdef void end_turn(IoConnection *connection) noexcept nogil:
    """The last step for a dirty connection: tells, writes, and closes it if it must go."""
    if not connection.must_close:
        tell_events(connection)
        if flush(connection) < 0:
            connection.must_close = True
        elif connection.session.event_head != NULL and tell_events(connection) < 0:     # the client has taken enough
            connection.must_close = True            # an answer to say that memory ran out would wait for the next turn
        if (connection.has_ended or connection.session.is_broken
                or (connection.unsent == NULL and is_over(connection.session))):
            connection.must_close = True
    if not connection.must_close:
        watch_connection(connection)
    if connection.must_close:
        destroy_connection(connection)
