"""The I/O thread of the gRPC door; see io_loop.pxd for the contract and for what a round does."""

from libc.errno cimport EAGAIN, ECONNABORTED, EINTR, errno
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free, malloc

from aiorch_server._core.buffers cimport Place
from aiorch_server._core.crossing cimport *
from aiorch_server._core.desk cimport abandon_request, dispatch_ready, read_claim, settle_request
from aiorch_server._core.h2 cimport *
from aiorch_server._core.h2_answer cimport expire_stream, revoke_stream
from aiorch_server._core.h2_life cimport next_tending, tend_due
from aiorch_server._core.h2_stream cimport Connection, Stream
from aiorch_server._core.io_connection cimport end_turn, open_io_connection, receive
from aiorch_server._core.io_plane cimport carry_out, post
from aiorch_server._core.io_state cimport *
from aiorch_server._core.passes cimport Claim, is_known
from aiorch_server._core.request cimport Request, abandon_sink, drain_sink, new_sink, now_ns, release_sink
from aiorch_server._core.routes cimport begin_round, end_round, place_tensor, release_router, retain_router
from aiorch_server._core.wire_request cimport find_tensor
from aiorch_server._core.timers cimport free_timers, next_due, take_due
from aiorch_server._core.transport cimport WIRE_SLACK_BYTES, PortSecurity, release_security, retain_security

cdef extern from "<sys/socket.h>" nogil:
    int accept4(int fd, sockaddr *peer, socklen_t *size, int flags)
    int SOCK_NONBLOCK
    int SOCK_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef enum:
    EVENTS_PER_ROUND = 128
    ACCEPTS_PER_ROUND = 64
    HANDSHAKES_PER_ROUND = 4            # a signature may take a millisecond: the others' calls come in between
    DRAIN_ROUND_TRIP_NS = 1000000000    # how long the client's answer between the two GOAWAYs is waited for
    ACCEPT_PAUSE_NS = 1000000000        # how long nobody is accepted when descriptors, say, have run out


# ---------------------------------------------------------------------------------------------------- life of the state
cdef bint place_rest(Stream *stream, const uint8_t *head, size_t size, size_t message_size, Place *place) noexcept nogil:
    cdef IoState *io = (<IoConnection *> stream.connection.owner).io
    cdef Claim claim
    if stream.group.passes != NULL:
        read_claim(stream, &claim)
        if not is_known(&claim, io.group.now_ns):
            return False                # rows of batches are for those who may ask
    return io.router != NULL and place_tensor(
        io.router, head, size, message_size, &stream.mark, place)


cdef IoState *new_io(const Limits *limits, const uint8_t *fast_path, size_t fast_path_size, RouterState *router,
                     int64_t greeting_timeout_ns, int64_t write_timeout_ns) noexcept nogil:
    cdef IoState *io = <IoState *> calloc(1, sizeof(IoState))
    if io == NULL:
        return NULL
    io.greeting_timeout_ns, io.write_timeout_ns = greeting_timeout_ns, write_timeout_ns
    io.idle.bits = EVENT_IDLE
    if router != NULL:
        retain_router(router)
        io.router = router
    io.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
    io.crossing = new_crossing()
    io.sink = new_sink()
    if io.sink != NULL:
        io.sink.takes_loans = True
    io.group = new_group(limits, fast_path, fast_path_size, abandon_request)
    if io.group != NULL:
        io.group.find_tensor = find_tensor
        io.group.place_rest = place_rest
    io.receive_buffer = <uint8_t *> malloc(RECEIVE_BYTES + TAIL_BYTES)
    io.outlet.buffer, io.outlet.capacity = <uint8_t *> malloc(SEND_BYTES), SEND_BYTES
    if (io.epoll_fd < 0 or io.crossing == NULL or io.sink == NULL or io.group == NULL
            or io.receive_buffer == NULL or io.outlet.buffer == NULL):
        free_io(io)
        return NULL
    io.commands_watched.kind, io.commands_watched.fd = WATCHED_COMMANDS, io.crossing.commands_fd
    io.sink_watched.kind, io.sink_watched.fd = WATCHED_SINK, io.sink.wake_fd
    if (watch(io, &io.commands_watched, EPOLLIN, EPOLL_CTL_ADD) < 0
            or watch(io, &io.sink_watched, EPOLLIN, EPOLL_CTL_ADD) < 0):
        free_io(io)
        return NULL
    return io


cdef int add_listener(IoState *io, int fd, PortSecurity *security) noexcept nogil:
    cdef Listener *listener = <Listener *> calloc(1, sizeof(Listener))
    if security != NULL and io.wire_buffer == NULL:
        io.wire_buffer = <uint8_t *> malloc(SEND_BYTES + WIRE_SLACK_BYTES)
    if listener == NULL or (security != NULL and io.wire_buffer == NULL):
        close(fd)
        free(listener)
        return -1
    listener.watched.kind, listener.watched.fd = WATCHED_LISTENER, fd
    if watch(io, &listener.watched, EPOLLIN, EPOLL_CTL_ADD) < 0:
        close(fd)
        free(listener)
        return -1
    if security != NULL:
        listener.security = retain_security(security)
    listener.next = io.listeners
    io.listeners = listener
    return 0


cdef void close_listeners(IoState *io) noexcept nogil:
    cdef Listener *listener
    while io.listeners != NULL:
        listener = io.listeners
        io.listeners = listener.next
        # others may hold the same socket open, then closing alone would not end the watch
        watch(io, &listener.watched, 0, EPOLL_CTL_DEL)
        close(listener.watched.fd)
        if listener.security != NULL:
            release_security(listener.security)
        free(listener)


cdef void free_io(IoState *io) noexcept nogil:
    close_listeners(io)
    if io.sink != NULL:
        abandon_sink(io.sink)           # all owners were taken back with their connections
        release_sink(io.sink)
    if io.group != NULL:
        release_group(io.group)
    if io.crossing != NULL:
        free_crossing(io.crossing)
    if io.router != NULL:
        release_router(io.router)
    if io.epoll_fd >= 0:
        close(io.epoll_fd)
    free_timers(&io.timers)
    free(io.receive_buffer)
    free(io.outlet.buffer)
    free(io.wire_buffer)
    free(io)


# ------------------------------------------------------------------------------------------------------------ listening
cdef void accept_connections(IoState *io, Listener *listener, int64_t now) noexcept nogil:
    cdef sockaddr_storage peer
    cdef socklen_t peer_size
    cdef int fd
    if io.lost_bytes > io.group.limits.max_buffered_bytes:
        pause_accepting(io, now)        # the loop must first hear of the calls that others gave up
        return
    for _ in range(ACCEPTS_PER_ROUND):
        peer_size = sizeof(peer)
        fd = accept4(listener.watched.fd, <sockaddr *> &peer, &peer_size, SOCK_NONBLOCK | SOCK_CLOEXEC)
        if fd < 0:
            if errno == EINTR or errno == ECONNABORTED:
                continue
            if errno != EAGAIN:
                pause_accepting(io, now)
            return
        if open_io_connection(io, fd, listener.security, &peer, peer_size, now) < 0:
            pause_accepting(io, now)
            return


cdef void pause_accepting(IoState *io, int64_t now) noexcept nogil:
    """Out of descriptors, memory or patience: the waiting client would only wake this thread again and again."""
    cdef Listener *listener = io.listeners
    io.accept_at_ns = now + ACCEPT_PAUSE_NS
    while listener != NULL:
        watch(io, &listener.watched, 0, EPOLL_CTL_MOD)
        listener = listener.next


cdef void resume_accepting(IoState *io) noexcept nogil:
    cdef Listener *listener = io.listeners
    io.accept_at_ns = 0
    while listener != NULL:
        watch(io, &listener.watched, EPOLLIN, EPOLL_CTL_MOD)
        listener = listener.next


# --------------------------------------------------------------------------------------------------- answers and orders
cdef void settle(IoState *io) noexcept nogil:
    """Answers have come: moves each to its stream."""
    cdef Request *request = drain_sink(io.sink)
    cdef Request *following
    cdef Connection *session
    while request != NULL:
        following = request.next
        session = settle_request(io.group, request)
        if session != NULL:
            mark_dirty(<IoConnection *> session.owner)
        request = following


cdef void settle_late(IoState *io) noexcept nogil:
    settle(io)
    if io.group != NULL:
        show_counts(io)


cdef void drain(IoState *io, int64_t now) noexcept nogil:
    cdef IoConnection *connection
    cdef Listener *listener = io.listeners
    if io.is_draining:
        return
    while listener != NULL:     # who was let in by the kernel is told where it stands
        accept_connections(io, listener, now)
        listener = listener.next
    close_listeners(io)
    io.accept_at_ns = 0
    io.is_draining = True
    io.finish_drain_ns = now + DRAIN_ROUND_TRIP_NS
    connection = io.connections
    while connection != NULL:
        drain_connection(connection.session)
        mark_dirty(connection)
        connection = connection.older


cdef void finish_drains(IoState *io) noexcept nogil:
    cdef IoConnection *connection = io.connections
    io.finish_drain_ns = 0
    while connection != NULL:
        finish_drain(connection.session)
        if connection.transport != NULL and not connection.transport.is_open:
            doom(connection)            # it would have nothing to hear but this
        mark_dirty(connection)
        connection = connection.older


cdef void revoke_calls(IoConnection *connection, int code, const char *text) noexcept nogil:
    cdef Stream *stream = connection.session.streams
    while stream != NULL:
        revoke_stream(stream, code, text)
        stream = stream.older
    mark_dirty(connection)


cdef void take_orders(IoState *io, int64_t now) noexcept nogil:
    """Carries out what the asyncio plane has asked for."""
    cdef Command *command = take_commands(io.crossing)
    cdef Command *following
    cdef IoConnection *connection
    while command != NULL:
        following = command.next
        if command.link != NULL:
            carry_out(io, command.link, command)
        elif command.kind == COMMAND_DRAIN:
            drain(io, now)
        else:
            io.is_stopping = io.is_stopping or command.kind == COMMAND_STOP
            connection = io.connections
            while connection != NULL:
                if command.kind == COMMAND_CANCEL_CALLS:
                    revoke_calls(connection, command.code, <const char *> command.data)
                else:
                    doom(connection)
                connection = connection.older
        free_command(command)
        command = following


# ------------------------------------------------------------------------------------------------------------ the round
cdef inline int64_t earlier(int64_t a_ns, int64_t b_ns) noexcept nogil:
    """Of two due times the first; 0 is never."""
    return b_ns if a_ns == 0 or (b_ns != 0 and b_ns < a_ns) else a_ns


cdef int find_timeout_ms(IoState *io) noexcept nogil:
    cdef int64_t due_ns = earlier(next_due(&io.group.deadlines), next_due(&io.timers))
    cdef int64_t left_ns
    due_ns = earlier(earlier(earlier(due_ns, next_tending(io.group)), io.finish_drain_ns), io.accept_at_ns)
    if due_ns == 0:
        return -1
    left_ns = due_ns - now_ns()
    if left_ns <= 0:
        return 0
    return <int> min((left_ns + 999999) // 1000000, <int64_t> 60000)


cdef void expire(IoState *io, int64_t now) noexcept nogil:
    cdef Stream *stream
    cdef Connection *session = tend_due(io.group, now)
    cdef IoConnection *connection
    while session != NULL:
        mark_dirty(<IoConnection *> session.owner)
        session = tend_due(io.group, now)
    while True:
        stream = <Stream *> take_due(&io.group.deadlines, now)
        if stream == NULL:
            break
        mark_dirty(<IoConnection *> stream.connection.owner)
        expire_stream(stream)
    while True:
        connection = <IoConnection *> take_due(&io.timers, now)
        if connection == NULL:
            break
        doom(connection)                # it neither greets nor reads
    if io.finish_drain_ns and io.finish_drain_ns <= now:
        finish_drains(io)
    if io.accept_at_ns and io.accept_at_ns <= now:
        resume_accepting(io)


cdef void end_turns(IoState *io) noexcept nogil:
    cdef IoConnection *connection = io.dirty
    cdef IoConnection *following
    io.dirty = NULL
    while connection != NULL:
        following = connection.next_dirty
        connection.is_dirty = False
        end_turn(connection)
        connection = following


cdef void show_counts(IoState *io) noexcept nogil:
    aiorch_store_size(&io.shown_connections, <size_t> io.n_connections)
    aiorch_store_size(&io.shown_in_flight, <size_t> io.group.in_flight)


cdef void tell_plane(IoState *io) noexcept nogil:
    """What the round has to say to the asyncio plane, with one wake-up."""
    cdef Event *first
    show_counts(io)
    if io.is_draining and io.n_connections == 0 and not io.is_idle_told:
        io.is_idle_told = True
        post(io, &io.idle)
    if io.events_head != NULL:
        first, io.events_head = io.events_head, NULL
        put_events(io.crossing, first, io.events_tail)
        io.events_tail = NULL


cdef void serve_connection(IoConnection *connection, uint32_t events, int64_t now) noexcept nogil:
    if connection.must_close:
        return
    if events & EPOLLOUT:
        connection.is_write_blocked = False
        mark_dirty(connection)
    if events & EPOLLIN:
        receive(connection, now)
    elif events & (EPOLLERR | EPOLLHUP):
        doom(connection)


cdef void run_round(IoState *io, epoll_event *events, int n) noexcept nogil:
    cdef int64_t now = now_ns()
    cdef Watched *watched
    cdef IoConnection *connection
    io.group.now_ns = now
    io.handshakes_left = HANDSHAKES_PER_ROUND
    for i in range(n):
        watched = <Watched *> events[i].data.ptr
        if watched.kind == WATCHED_CONNECTION:
            serve_connection(<IoConnection *> watched, events[i].events, now if i == 0 else now_ns())
        elif watched.kind == WATCHED_SINK:
            settle(io)
        elif watched.kind == WATCHED_LISTENER and not io.is_draining and io.accept_at_ns == 0:
            accept_connections(io, <Listener *> watched, now)
    # after the listeners, because a drain frees them; after the bytes, so that what they ended is not answered
    for i in range(n):
        if (<Watched *> events[i].data.ptr) == &io.commands_watched:
            take_orders(io, now)
    expire(io, now_ns())
    if io.router != NULL:
        begin_round(io.router, &io.reader)
    connection = io.dirty
    while connection != NULL:
        if not connection.must_close:
            dispatch_ready(connection.session, &io.reader, io.sink)
        connection = connection.next_dirty
    end_round(&io.reader)
    end_turns(io)
    tell_plane(io)


cdef void run_loop(IoState *io) noexcept nogil:
    cdef epoll_event events[EVENTS_PER_ROUND]
    cdef int n
    while not io.is_stopping:
        n = epoll_wait(io.epoll_fd, events, EVENTS_PER_ROUND, find_timeout_ms(io))
        run_round(io, events, n if n > 0 else 0)
    close_listeners(io)
    tell_plane(io)
