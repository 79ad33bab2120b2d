"""The asyncio driver of the native gRPC door; see aio.pxd for the contract and for what a loop tick does."""

import asyncio
import logging
import socket
import urllib.parse

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.stdlib cimport free, malloc

from aiorch_server._core.aio_call cimport CallCarrier, StreamCall
from aiorch_server._core.desk cimport abandon_request, dispatch_ready, settle_request
from aiorch_server._core.h2 cimport *
from aiorch_server._core.h2_answer cimport expire_stream, revoke_stream
from aiorch_server._core.h2_ledger cimport ServerLedger, has_place
from aiorch_server._core.h2_life cimport ConnectionRules, balance_books, begin_life, next_tending, tend_due
from aiorch_server._core.h2_request cimport take_event
from aiorch_server._core.h2_stream cimport *
from aiorch_server._core.passes cimport Passes
from aiorch_server._core.request cimport (
    CompletionSink,
    Request,
    abandon_sink,
    drain_sink,
    new_sink,
    now_ns,
    release_sink,
)
from aiorch_server._core.routes cimport Router, begin_round, end_round
from aiorch_server._core.timers cimport next_due, take_due
from aiorch_server._core.transport cimport PeerIdentity, new_identity

logger = logging.getLogger(__name__)

cdef enum:
    RECEIVE_BYTES = 262144
    SEND_BYTES = 262144
    GREETING_BYTES = 33                 # client preface and the header of its SETTINGS frame
    TRANSPORT_HIGH_WATER_BYTES = 1048576
    READ_SLICE_NS = 5000000             # a connection whose bytes took longer waits for its next turn
    RELEASE_GIL_BYTES = 32768           # below, taking the lock back can cost more than the work
    STATUS_INTERNAL = 13

cdef double DRAIN_ROUND_TRIP_S = 1.0    # how long the client's answer between the two GOAWAYs is waited for


cdef str name_peer(object transport):
    """The peer as gRPC writes it: ``ipv4:127.0.0.1:5000``, ``ipv6:%5B::1%5D:5000``, ``unix:``."""
    family = getattr(transport.get_extra_info("socket"), "family", None)
    name = transport.get_extra_info("peername")
    if name is None and family in (socket.AF_INET, socket.AF_INET6):
        return "unknown"        # reset before it was accepted: connection_lost comes next
    if family == socket.AF_INET:
        return f"ipv4:{name[0]}:{name[1]}"
    if family == socket.AF_INET6:
        return f"ipv6:{urllib.parse.quote(f'[{name[0]}]', safe=':')}:{name[1]}"
    return "unix:"


cdef PeerIdentity *identify(bytes certificate) except? NULL:
    """Of a handshake that asyncio has made; NULL: the client has shown nothing."""
    cdef PeerIdentity *identity
    if certificate is None:
        return NULL
    identity = new_identity(<const uint8_t *> PyBytes_AS_STRING(certificate), <size_t> PyBytes_GET_SIZE(certificate))
    if identity == NULL:
        raise MemoryError
    return identity


cdef class NativeServer:
    """All connections of one loop; listening sockets are the caller's (see ``make_protocol``)."""

    def __cinit__(self, loop, on_call, Router router=None, *, str fast_path="", double greeting_timeout_s=20.0,
                  double write_timeout_s=60.0, ConnectionRules rules=None, ServerLedger ledger=None,
                  uint32_t packed_encodings=0, Passes passes=None, **limits):
        cdef SessionLimits bounds = SessionLimits(**limits)
        cdef bytes path = fast_path.encode() if router is not None else b""
        self.loop, self.on_call, self.router = loop, on_call, router
        self.protocols, self.dirty, self.idle_waiters = set(), [], []
        self.tick = self._tick
        self.greeting_timeout_s, self.write_timeout_s = greeting_timeout_s, write_timeout_s
        self.group = new_group(&bounds.limits, <const uint8_t *> PyBytes_AS_STRING(path), len(path), abandon_request)
        self.receive_buffer = <uint8_t *> malloc(RECEIVE_BYTES)
        self.send_buffer = <uint8_t *> malloc(SEND_BYTES)
        if self.group == NULL or self.receive_buffer == NULL or self.send_buffer == NULL:
            raise MemoryError
        if rules is None:
            rules = ConnectionRules()
        set_rules(self.group, &rules.rules, ledger.ledger if ledger is not None else NULL, packed_encodings)
        if passes is not None:
            set_passes(self.group, passes.table)
        self.receive_view = <uint8_t[:RECEIVE_BYTES]> self.receive_buffer
        self.sink = new_sink()
        if self.sink == NULL:
            raise OSError("no file descriptor or memory left for the completion sink")
        loop.add_reader(self.sink.wake_fd, self._on_settled)

    def __dealloc__(self):
        # the loop holds a reference through add_reader: here the sink is closed, or the loop is gone
        if self.sink != NULL:
            abandon_sink(self.sink)     # all owners were taken back with their connections
            release_sink(self.sink)
        if self.group != NULL:
            release_group(self.group)
        free(self.receive_buffer)
        free(self.send_buffer)

    # ------------------------------------------------------------------------------------------ what the door calls
    def make_protocol(self):
        """A protocol for one accepted connection: the factory for ``loop.create_server``."""
        return ServerProtocol(self)

    @property
    def connections(self):
        """The number of open connections."""
        return len(self.protocols)

    @property
    def in_flight(self):
        """The number of requests of the fast path that have not come back from their queues."""
        return self.group.in_flight

    def drain(self):
        """Tells all clients to open no more streams; connections close when their streams are answered."""
        cdef ConnectionProtocol protocol
        self.is_draining = True
        for protocol in list(self.protocols):
            if protocol.connection != NULL:
                drain_connection(protocol.connection)
                self.mark_dirty(protocol)
        self.loop.call_later(DRAIN_ROUND_TRIP_S, self._finish_drain)

    def _finish_drain(self):
        cdef ConnectionProtocol protocol
        for protocol in list(self.protocols):
            if protocol.connection != NULL:
                finish_drain(protocol.connection)
                self.mark_dirty(protocol)

    def cancel_calls(self, int code, str text):
        """Answers all open calls with this status; handlers of slow calls are told that they are over."""
        cdef ConnectionProtocol protocol
        cdef Stream *stream
        cdef bytes encoded = text.encode()
        for protocol in list(self.protocols):
            if protocol.connection == NULL:
                continue
            stream = protocol.connection.streams
            while stream != NULL:
                revoke_stream(stream, code, PyBytes_AS_STRING(encoded))
                stream = stream.older
            self.mark_dirty(protocol)

    def abort_connections(self):
        """Closes all connections now, whatever is still unsent."""
        cdef ConnectionProtocol protocol
        for protocol in list(self.protocols):
            protocol.transport.abort()

    def wait_disconnected(self):
        """A future that is done when no connection is open."""
        waiter = self.loop.create_future()
        if self.protocols:
            self.idle_waiters.append(waiter)
        else:
            waiter.set_result(None)
        return waiter

    def close(self):
        """Lets go of the loop, as soon as all requests in flight have come back. Close the connections first."""
        self.is_closing = True
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.group.in_flight == 0:
            self.close_sink()

    cdef int close_sink(self) except -1:
        cdef CompletionSink *sink = self.sink
        if sink != NULL:
            self.sink = NULL
            self.loop.remove_reader(sink.wake_fd)
            release_sink(sink)
        return 0

    # ------------------------------------------------------------------------------------------------ the loop's tick
    cdef int mark_dirty(self, ConnectionProtocol protocol) except -1:
        if not protocol.is_dirty:
            protocol.is_dirty = True
            self.dirty.append(protocol)
        if not self.is_tick_scheduled:
            self.is_tick_scheduled = True
            self.loop.call_soon(self.tick)
        return 0

    def _tick(self):
        self.is_tick_scheduled = False
        self.run_tick()

    cdef int run_tick(self) except -1:
        cdef list dirty = self.dirty
        cdef ConnectionProtocol protocol
        exiting = None
        self.dirty = []
        self.group.now_ns = now_ns()
        if self.router is not None:
            begin_round(self.router.state, &self.reader)
        for protocol in dirty:
            protocol.is_dirty = False
            if protocol.connection != NULL:
                dispatch_ready(protocol.connection, &self.reader, self.sink)
        end_round(&self.reader)
        for protocol in dirty:
            try:
                protocol.handle_events()
                protocol.flush()
                protocol.end_rest()
            except Exception as error:
                self.loop.call_exception_handler(
                    {"message": "a connection could not be served", "exception": error, "protocol": protocol})
                protocol.transport.abort()      # what should have gone out may be lost
            except BaseException as error:      # an order to exit: the others have their turn first
                exiting = error
                self.mark_dirty(protocol)
        self.arm_timer()
        if exiting is not None:
            raise exiting
        return 0

    def _on_settled(self):
        """Answers have come: moves each to its stream and writes once per connection."""
        cdef Request *request
        cdef Request *following
        cdef Connection *connection
        cdef ConnectionProtocol protocol
        if self.sink == NULL:
            return
        request = drain_sink(self.sink)
        self.group.now_ns = now_ns()
        while request != NULL:
            following = request.next
            connection = settle_request(self.group, request)
            if connection != NULL:
                protocol = <ConnectionProtocol> connection.owner
                if not protocol.is_dirty:
                    protocol.is_dirty = True
                    self.dirty.append(protocol)
            request = following
        self.run_tick()
        if self.is_closing and self.group.in_flight == 0:
            self.close_sink()

    cdef int arm_timer(self) except -1:
        cdef int64_t due_ns = next_due(&self.group.deadlines)
        cdef int64_t tending_ns = next_tending(self.group)
        if due_ns == 0 or (tending_ns and tending_ns < due_ns):
            due_ns = tending_ns
        if due_ns == 0 or (self.timer is not None and self.timer_due_ns <= due_ns):
            return 0
        if self.timer is not None:
            self.timer.cancel()
        self.timer_due_ns = due_ns
        # one millisecond more: loops round down, and a timer that is early would only be set again
        self.timer = self.loop.call_later(max(0, due_ns - now_ns()) / 1e9 + 0.001, self._on_deadline)
        return 0

    def _on_deadline(self):
        cdef int64_t now = now_ns()
        cdef Connection *connection = tend_due(self.group, now)
        cdef Stream *stream = <Stream *> take_due(&self.group.deadlines, now)
        self.timer = None
        while connection != NULL:
            self.mark_dirty(<ConnectionProtocol> connection.owner)
            connection = tend_due(self.group, now)
        while stream != NULL:
            protocol = <ConnectionProtocol> stream.connection.owner
            expire_stream(stream)
            self.mark_dirty(protocol)
            stream = <Stream *> take_due(&self.group.deadlines, now)
        self.run_tick()


cdef class ConnectionProtocol(CallCarrier):
    """One connection; ``ServerProtocol`` is what loops get to see."""

    def __init__(self, NativeServer server not None):
        self.server = server
        self.loop = server.loop
        self.peer_name = ""

    def __dealloc__(self):
        # only where the loop ended without connection_lost
        cdef Stream *stream
        cdef uint32_t events
        if self.connection != NULL:
            close_connection(self.connection)
            while True:
                stream = take_event(self.connection, &events)
                if stream == NULL:
                    break
                if stream.owner != NULL:
                    (<StreamCall> stream.owner).stream = NULL
                    Py_DECREF(<StreamCall> stream.owner)
                    stream.owner = NULL
                release_stream(stream)
            free_connection(self.connection)

    # -------------------------------------------------------------------------------------- what the transport calls
    def connection_made(self, transport):
        self.transport = transport
        self.server.protocols.add(self)
        ssl_object = transport.get_extra_info("ssl_object")
        if ssl_object is not None and ssl_object.selected_alpn_protocol() != "h2":
            logger.debug("refused a TLS connection that did not negotiate h2")
            transport.abort()
            return
        sock = transport.get_extra_info("socket")
        self.peer_name = name_peer(transport)
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if not has_place(self.server.group.ledger):
            transport.abort()
            return
        self.connection = open_connection(self.server.group, <void *> self)
        if self.connection == NULL or begin_life(self.connection, now_ns()) < 0:
            logger.error("no memory for another connection")
            transport.abort()
            return
        if ssl_object is not None and self.server.group.passes != NULL:
            self.connection.identity = identify(ssl_object.getpeercert(True))
        self.server.arm_timer()
        transport.set_write_buffer_limits(high=TRANSPORT_HIGH_WATER_BYTES)
        self.greeting_timer = self.server.loop.call_later(self.server.greeting_timeout_s, self._on_stalled)
        if self.server.is_draining:
            drain_connection(self.connection)
        self.flush()

    def connection_lost(self, exception):
        cdef Connection *connection = self.connection
        for timer in (self.greeting_timer, self.write_timer):
            if timer is not None:
                timer.cancel()
        self.greeting_timer = self.write_timer = None
        if connection != NULL:
            close_connection(connection)
            self.handle_events()
            self.connection = NULL
            free_connection(connection)
        self.server.protocols.discard(self)
        if not self.server.protocols:
            waiters, self.server.idle_waiters = self.server.idle_waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def get_buffer(self, Py_ssize_t size_hint):
        return self.server.receive_view

    def buffer_updated(self, Py_ssize_t size):
        cdef int result
        cdef int64_t now
        cdef const uint8_t *data = self.server.receive_buffer
        if self.connection == NULL:
            return
        now = now_ns()
        if size > RELEASE_GIL_BYTES:
            with nogil:
                result = feed(self.connection, data, <size_t> size, now)
        else:
            result = feed(self.connection, data, <size_t> size, now)
        if result < 0:
            self.transport.abort()
            return
        if self.greeting_timer is not None:
            self.greeting_bytes += <size_t> size
            if self.greeting_bytes >= GREETING_BYTES:
                self.greeting_timer.cancel()
                self.greeting_timer = None
        self.server.mark_dirty(self)
        if self.connection.event_head != NULL:
            self.handle_events()
        # Loops read one socket again and again while it has more: small frames that cost much must not hold up others.
        self.busy_ns += now_ns() - now
        if self.busy_ns > READ_SLICE_NS and not self.is_resting:
            self.is_resting = True
            self.transport.pause_reading()

    def eof_received(self):
        return False        # a client that only listens is of no use to HTTP/2: close

    def pause_writing(self):
        self.is_write_paused = True
        if self.write_timer is None:
            self.write_timer = self.server.loop.call_later(self.server.write_timeout_s, self._on_stalled)

    def resume_writing(self):
        self.is_write_paused = False
        if self.write_timer is not None:
            self.write_timer.cancel()
            self.write_timer = None
        if self.is_read_paused:
            self.is_read_paused = False
            if self.connection != NULL:
                self.connection.life.is_unread = False
            self.transport.resume_reading()
        self.server.mark_dirty(self)

    def _on_stalled(self):
        logger.debug("closed the connection of %s: it neither greets nor reads", self.peer_name)
        self.transport.abort()

    # ------------------------------------------------------------------------------------------------------- the tick
    cdef int mark_dirty(self) except -1:
        return self.server.mark_dirty(self)

    cdef int handle_events(self) except -1:
        cdef Stream *stream
        cdef uint32_t events
        while self.connection != NULL:
            stream = take_event(self.connection, &events)
            if stream == NULL:
                break
            try:
                self.handle_event(stream, events)
            except Exception as error:
                self.server.loop.call_exception_handler(
                    {"message": "a call could not be started or told", "exception": error, "protocol": self})
        return 0

    cdef int handle_event(self, Stream *stream, unsigned int events) except -1:
        cdef StreamCall call
        if events & EVENT_OVER:
            call = <StreamCall> stream.owner
            call.stream = NULL
            stream.owner = NULL
            release_stream(stream)
            Py_DECREF(call)
            call.end()
            return 0
        if stream.owner == NULL:
            try:
                call = StreamCall.__new__(StreamCall)
                call.open(self, stream)
                self.server.on_call(call)
            except BaseException:
                if stream.owner != NULL:
                    (<StreamCall> stream.owner).finish(STATUS_INTERNAL, "The server failed to start the call")
                else:
                    revoke_stream(stream, STATUS_INTERNAL, b"The server failed to start the call")
                raise
        else:
            call = <StreamCall> stream.owner
        if events & EVENT_HALF_CLOSE:
            call.is_half_closed = True
        if events & (EVENT_MESSAGE | EVENT_HALF_CLOSE) and call.readable is not None:
            call.wake_reader()
        if events & EVENT_WRITABLE and call.writable is not None:
            call.wake_writer()
        return 0

    cdef int flush(self) except -1:
        """Writes what the session has to say, until the transport has enough."""
        cdef Py_ssize_t size
        if self.connection == NULL or self.transport.is_closing():
            return 0
        if self.is_write_paused:
            balance_books(self.connection)      # nobody collects the answers that come meanwhile
        while not self.is_write_paused:
            size = collect(self.connection, self.server.send_buffer, SEND_BYTES)
            if size < 0:
                self.transport.abort()
                return 0
            if size == 0:
                break
            self.transport.write(PyBytes_FromStringAndSize(<char *> self.server.send_buffer, size))
        if self.connection.event_head != NULL:
            self.handle_events()
        if self.connection.is_broken:
            self.transport.abort()
        elif is_over(self.connection):
            self.transport.close()
            if self.write_timer is None:    # it closes when the client has taken what is buffered
                self.write_timer = self.server.loop.call_later(self.server.write_timeout_s, self._on_stalled)
        elif (self.is_write_paused and not self.is_read_paused
                and self.connection.outbound_bytes > self.server.group.limits.max_outbound_bytes):
            self.is_read_paused = self.connection.life.is_unread = True
            self.transport.pause_reading()
        return 0

    cdef int end_rest(self) except -1:
        """The others had their turn: reads on, unless the client has to take answers first."""
        self.busy_ns = 0
        if self.is_resting:
            self.is_resting = False
            if self.connection != NULL and not self.is_read_paused and not self.transport.is_closing():
                self.transport.resume_reading()
        return 0


class ServerProtocol(ConnectionProtocol, asyncio.BufferedProtocol):
    """What asyncio's own loop wants to see: a subclass of its BufferedProtocol."""
