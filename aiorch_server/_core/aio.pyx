"""The asyncio driver of the native gRPC door; see aio.pxd for the contract and DESIGN of a loop tick."""

import asyncio
import logging
import socket
import urllib.parse

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, strlen

from aiorch_server._core.grpc_text cimport put_frame_prefix
from aiorch_server._core.h2 cimport *
from aiorch_server._core.h2_answer cimport (
    answer_stream,
    expire_stream,
    fail_stream,
    finish_stream,
    revoke_stream,
    send_head,
    send_message,
)
from aiorch_server._core.h2_request cimport make_slow, take_event, take_message, take_ready
from aiorch_server._core.h2_stream cimport *
from aiorch_server._core.request cimport (
    CompletionSink,
    Request,
    drain_sink,
    free_request,
    new_sink,
    now_ns,
    release_sink,
)
from aiorch_server._core.routes cimport DISPATCHED, Router, cancel_request
from aiorch_server._core.timers cimport next_due, take_due

logger = logging.getLogger(__name__)

cdef enum:
    RECEIVE_BYTES = 262144
    SEND_BYTES = 262144
    GREETING_BYTES = 33                 # client preface and the header of its SETTINGS frame
    TRANSPORT_HIGH_WATER_BYTES = 1048576
    RELEASE_GIL_BYTES = 32768           # below, taking the lock back can cost more than the work
    STATUS_INTERNAL = 13

cdef double DRAIN_ROUND_TRIP_S = 1.0    # how long the client's answer between the two GOAWAYs is waited for
cdef tuple ENCODINGS = ("identity", "gzip", "deflate")
cdef size_t MAX_FRAME_BYTES = 0xFFFFFFFF


cdef void abandon_request(Stream *stream) noexcept nogil:
    """Cuts the tie between a stream that is over and its request in flight."""
    cdef Request *request = <Request *> stream.request
    stream.request = NULL
    if cancel_request(request):
        stream.group.in_flight -= 1
        free_request(request)
    else:
        request.owner = NULL            # it comes through the sink and is freed there


cdef str name_peer(object transport):
    """The peer as gRPC writes it: ``ipv4:127.0.0.1:5000``, ``ipv6:%5B::1%5D:5000``, ``unix:``."""
    family = getattr(transport.get_extra_info("socket"), "family", None)
    name = transport.get_extra_info("peername")
    if family == socket.AF_INET:
        return f"ipv4:{name[0]}:{name[1]}"
    if family == socket.AF_INET6:
        return f"ipv6:{urllib.parse.quote(f'[{name[0]}]', safe=':')}:{name[1]}"
    return "unix:"


cdef class NativeServer:
    """All connections of one loop; listening sockets are the caller's (see ``make_protocol``)."""

    def __cinit__(self, loop, on_call, Router router=None, *, str fast_path="", size_t max_message_bytes=64 << 20,
                  uint32_t max_concurrent_streams=1024, uint32_t max_header_list_bytes=16 << 10,
                  uint32_t stream_window_bytes=8 << 20, uint32_t connection_window_bytes=16 << 20,
                  size_t max_buffered_bytes=256 << 20, size_t max_outbound_bytes=256 << 20,
                  size_t high_water_bytes=1 << 20, double greeting_timeout_s=20.0, double write_timeout_s=60.0):
        cdef Limits limits
        cdef bytes path = fast_path.encode() if router is not None else b""
        if stream_window_bytes >= 1 << 31 or connection_window_bytes >= 1 << 31:
            raise ValueError("HTTP/2 windows end at 2147483647 bytes")
        limits.max_message_bytes, limits.max_concurrent_streams = max_message_bytes, max_concurrent_streams
        limits.max_header_list_bytes, limits.stream_window_bytes = max_header_list_bytes, stream_window_bytes
        limits.connection_window_bytes, limits.max_buffered_bytes = connection_window_bytes, max_buffered_bytes
        limits.max_outbound_bytes, limits.high_water_bytes = max_outbound_bytes, high_water_bytes
        self.loop, self.on_call, self.router = loop, on_call, router
        self.protocols, self.dirty, self.idle_waiters = set(), [], []
        self.tick = self._tick
        self.greeting_timeout_s, self.write_timeout_s = greeting_timeout_s, write_timeout_s
        self.group = new_group(&limits, <const uint8_t *> PyBytes_AS_STRING(path), len(path), abandon_request)
        self.receive_buffer = <uint8_t *> malloc(RECEIVE_BYTES)
        self.send_buffer = <uint8_t *> malloc(SEND_BYTES)
        if self.group == NULL or self.receive_buffer == NULL or self.send_buffer == NULL:
            raise MemoryError
        self.receive_view = <uint8_t[:RECEIVE_BYTES]> self.receive_buffer
        self.sink = new_sink()
        if self.sink == NULL:
            raise OSError("no file descriptor or memory left for the completion sink")
        loop.add_reader(self.sink.wake_fd, self._on_settled)

    def __dealloc__(self):
        # the loop holds a reference through add_reader: here the sink is closed, or the loop is gone
        cdef Request *request
        cdef Request *following
        if self.sink != NULL:
            request = drain_sink(self.sink)
            while request != NULL:
                following = request.next
                free_request(request)
                request = following
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
    cdef void mark_dirty(self, ConnectionProtocol protocol):
        if not protocol.is_dirty:
            protocol.is_dirty = True
            self.dirty.append(protocol)
        if not self.is_tick_scheduled:
            self.is_tick_scheduled = True
            self.loop.call_soon(self.tick)

    def _tick(self):
        self.is_tick_scheduled = False
        self.run_tick()

    cdef int run_tick(self) except -1:
        cdef list dirty = self.dirty
        cdef ConnectionProtocol protocol
        cdef bint is_dispatched = False
        self.dirty = []
        for protocol in dirty:
            protocol.is_dirty = False
            if protocol.connection != NULL and protocol.dispatch():
                is_dispatched = True
        if is_dispatched:
            self.router.wake_instances()
        for protocol in dirty:
            protocol.handle_events()
            protocol.flush()
        self.arm_timer()
        return 0

    def _on_settled(self):
        """Answers have come: moves each to its stream and writes once per connection."""
        cdef Request *request
        cdef Request *following
        cdef Stream *stream
        cdef ConnectionProtocol protocol
        if self.sink == NULL:
            return
        request = drain_sink(self.sink)
        while request != NULL:
            following = request.next
            self.group.in_flight -= 1
            stream = <Stream *> request.owner
            if stream != NULL:
                stream.request = NULL
                protocol = <ConnectionProtocol> stream.connection.owner
                if not protocol.is_dirty:
                    protocol.is_dirty = True
                    self.dirty.append(protocol)
                if request.status != 0:
                    fail_stream(stream, request.status, <const uint8_t *> request.error,
                                strlen(request.error) if request.error != NULL else 0)
                elif request.response == NULL:
                    fail_stream(stream, STATUS_INTERNAL, NULL, 0)
                else:
                    answer_stream(stream, request.response, request.response_size)
                    request.response = NULL     # it is the stream's now
            free_request(request)
            request = following
        self.run_tick()
        if self.is_closing and self.group.in_flight == 0:
            self.close_sink()

    cdef int arm_timer(self) except -1:
        cdef int64_t due_ns = next_due(&self.group.deadlines)
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
        cdef Stream *stream = <Stream *> take_due(&self.group.deadlines, now)
        self.timer = None
        while stream != NULL:
            protocol = <ConnectionProtocol> stream.connection.owner
            expire_stream(stream)
            self.mark_dirty(protocol)
            stream = <Stream *> take_due(&self.group.deadlines, now)
        self.run_tick()


cdef class ConnectionProtocol:
    """One connection; ``ServerProtocol`` is what loops get to see."""

    def __init__(self, NativeServer server not None):
        self.server = server
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
                    (<Call> stream.owner).stream = NULL
                    Py_DECREF(<Call> stream.owner)
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
        self.connection = open_connection(self.server.group, <void *> self)
        if self.connection == NULL:
            logger.error("no memory for another connection")
            transport.abort()
            return
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
        if self.connection.event_head != NULL:
            self.handle_events()
        self.server.mark_dirty(self)

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
            self.transport.resume_reading()
        self.server.mark_dirty(self)

    def _on_stalled(self):
        logger.debug("closed the connection of %s: it neither greets nor reads", self.peer_name)
        self.transport.abort()

    # ------------------------------------------------------------------------------------------------------- the tick
    cdef bint dispatch(self):
        """Puts complete messages into their queues; what the router declines becomes a slow call."""
        cdef Router router = self.server.router
        cdef Group *group = self.server.group
        cdef CompletionSink *sink = self.server.sink
        cdef Request *request = NULL
        cdef bint is_dispatched = False
        cdef Stream *stream = take_ready(self.connection)
        while stream != NULL:
            if (stream.message != NULL and sink != NULL and router.dispatch(
                    stream.message, stream.message_size, stream.received_ns, stream.deadline.due_ns, sink, stream,
                    &request) == DISPATCHED):
                stream.message = NULL
                stream.request = request
                group.in_flight += 1
                is_dispatched = True
            else:
                make_slow(stream)
            stream = take_ready(self.connection)
        return is_dispatched

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
        cdef Call call
        if events & EVENT_OVER:
            call = <Call> stream.owner
            call.stream = NULL
            stream.owner = NULL
            release_stream(stream)
            Py_DECREF(call)
            call.end()
            return 0
        if stream.owner == NULL:
            try:
                call = Call.__new__(Call)
                call.open(self, stream)
                self.server.on_call(call)
            except Exception:
                if stream.owner != NULL:
                    (<Call> stream.owner).finish(STATUS_INTERNAL, "The server failed to start the call")
                else:
                    revoke_stream(stream, STATUS_INTERNAL, b"The server failed to start the call")
                raise
        else:
            call = <Call> stream.owner
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
        if is_over(self.connection):
            self.transport.close()
        elif (self.is_write_paused and not self.is_read_paused
                and self.connection.outbound_bytes > self.server.group.limits.max_outbound_bytes):
            self.is_read_paused = True
            self.transport.pause_reading()
        return 0


class ServerProtocol(ConnectionProtocol, asyncio.BufferedProtocol):
    """What asyncio's own loop wants to see: a subclass of its BufferedProtocol."""


cdef class Call:
    """One call on the Python plane, as bytes; made by the driver and passed to ``on_call``.

    ``metadata`` are the request's header pairs as bytes, without those that gRPC itself uses. All methods belong to
    the loop's thread. When the call is over before ``finish`` (cancelled, expired, connection lost), the callback is
    called once, and everything sent later is dropped without an error.
    """

    cdef int open(self, ConnectionProtocol protocol, Stream *stream) except -1:
        self.protocol = protocol
        self.path = ""
        self.metadata = []
        for pair in unpack_metadata(stream.metadata, stream.metadata_size):
            if pair[0] == b":path":
                self.path = pair[1].decode("latin-1")
            else:
                self.metadata.append(pair)
        self.encoding = ENCODINGS[<int> stream.encoding]
        self.deadline_ns = stream.deadline.due_ns
        self.stream = stream
        stream.owner = <void *> self
        Py_INCREF(self)
        return 0

    cdef void end(self):
        """The stream is gone: wakes whoever waits, tells the owner."""
        self.is_over = True
        self.wake_reader()
        self.wake_writer()
        callback, self.over_callback = self.over_callback, None
        if callback is not None:
            try:
                callback()
            except Exception:
                logger.exception("a callback for the end of a call failed")

    cdef int wake_reader(self) except -1:
        waiter, self.readable = self.readable, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        return 0

    cdef int wake_writer(self) except -1:
        waiter, self.writable = self.writable, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        return 0

    def set_over_callback(self, callback):
        """``callback()`` runs when the call is over before ``finish``; at once if it is over already."""
        if self.is_over:
            callback()
        else:
            self.over_callback = callback

    @property
    def peer(self):
        """The client's address as gRPC writes it."""
        return self.protocol.peer_name

    def get_extra_info(self, name):
        """What the transport knows: ``ssl_object``, ``peercert``, ``sockname`` and so on."""
        return self.protocol.transport.get_extra_info(name)

    def time_remaining(self):
        """Seconds until the deadline, not below 0; None without a deadline."""
        if self.deadline_ns == 0:
            return None
        return max(0, self.deadline_ns - now_ns()) / 1e9

    def take_message(self):
        """The next complete message as ``(bytes, is_compressed)``, or None when there is none (yet)."""
        cdef Message *message
        if self.stream == NULL:
            return None
        message = take_message(self.stream)
        if message == NULL:
            return None
        try:
            return PyBytes_FromStringAndSize(<char *> message.data, message.size), bool(message.is_compressed)
        finally:
            free_message(message)
            self.protocol.server.mark_dirty(self.protocol)

    def wait_readable(self):
        """A future that is done when ``take_message`` is worth another try. RuntimeError: another read is waiting."""
        waiter = self.protocol.server.loop.create_future()
        if self.stream == NULL or self.is_half_closed or self.stream.inbox_head != NULL:
            waiter.set_result(None)
            return waiter
        if self.readable is not None and not self.readable.done():
            raise RuntimeError("only one read at a time: another one is still waiting")
        self.readable = waiter
        return waiter

    @property
    def is_congested(self):
        """Whether so much is unsent that a writer should wait."""
        return self.stream != NULL and self.stream.unsent_bytes > self.protocol.server.group.limits.high_water_bytes

    def wait_writable(self):
        """A future that is done when the client has taken enough. RuntimeError: another writer is waiting."""
        waiter = self.protocol.server.loop.create_future()
        if not self.is_congested:
            waiter.set_result(None)
            return waiter
        if self.writable is not None and not self.writable.done():
            raise RuntimeError("only one write at a time: another one is still waiting")
        self.stream.wants_writable = True
        self.writable = waiter
        return waiter

    def send_initial_metadata(self, metadata):
        """Sends the response headers with these pairs of bytes. RuntimeError: they were sent already."""
        cdef bytes packed = pack_metadata(metadata)
        if self.is_head_sent:
            raise RuntimeError("initial metadata was sent already")
        self.is_head_sent = True
        if self.stream != NULL:
            send_head(self.stream, <const uint8_t *> PyBytes_AS_STRING(packed), len(packed))
            self.protocol.server.mark_dirty(self.protocol)

    def send_message(self, message):
        """Queues one response message, any bytes-like object, which is copied. ValueError above 4 GiB."""
        cdef const uint8_t[::1] view = message
        cdef size_t size = <size_t> view.shape[0]
        cdef uint8_t *frame
        if self.stream == NULL:
            return
        if size > MAX_FRAME_BYTES:
            raise ValueError(f"a gRPC message ends at 4294967295 bytes, this one has {size}")
        frame = <uint8_t *> malloc(FRAME_PREFIX_BYTES + size)
        if frame == NULL:
            raise MemoryError
        put_frame_prefix(frame, size)
        if size:
            memcpy(frame + FRAME_PREFIX_BYTES, &view[0], size)
        self.is_head_sent = True
        send_message(self.stream, frame, FRAME_PREFIX_BYTES + size)
        self.protocol.server.mark_dirty(self.protocol)

    def finish(self, int code, str details="", trailing_metadata=()):
        """Ends the call; nothing happens when it is over or finished already."""
        cdef bytes text
        cdef bytes packed
        cdef Stream *stream = self.stream
        if stream == NULL:
            return
        text = details.encode("utf-8", "replace")
        packed = pack_metadata(trailing_metadata)
        self.stream = NULL
        self.over_callback = None
        finish_stream(stream, code, <const uint8_t *> PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text),
                      <const uint8_t *> PyBytes_AS_STRING(packed), PyBytes_GET_SIZE(packed))
        detach_owner(stream)
        Py_DECREF(self)
        self.wake_reader()
        self.wake_writer()
        self.protocol.server.mark_dirty(self.protocol)
