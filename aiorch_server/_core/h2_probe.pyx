"""gRPC sessions as unit tests see them: the test plays the driver and the client's socket."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from aiorch_server._core.buffers cimport Place, drop_buffer, new_buffer
from aiorch_server._core.grpc_text cimport put_frame_prefix
from aiorch_server._core.h2 cimport *
from aiorch_server._core.h2_answer cimport (
    answer_stream,
    expire_stream,
    fail_stream,
    finish_stream,
    send_head,
    send_message,
)
from aiorch_server._core.h2_ledger cimport ServerLedger
from aiorch_server._core.h2_life cimport ConnectionRules, begin_life, next_tending, tend_due
from aiorch_server._core.h2_landing cimport MAX_LANDING_BYTES, Landing, feed_landing, plan_landing
from aiorch_server._core.h2_request cimport make_slow, take_event, take_message, take_ready
from aiorch_server._core.h2_stream cimport *
from aiorch_server._core.timers cimport next_due, take_due


_SMALL_LIMITS = {
    "max_message_bytes": 1 << 20,
    "max_concurrent_streams": 100,
    "stream_window_bytes": 1 << 20,
    "connection_window_bytes": 1 << 21,
    "max_buffered_bytes": 1 << 22,
    "max_outbound_bytes": 1 << 22,
    "high_water_bytes": 65536,
}


cdef void abandon_probed(Stream *stream) noexcept nogil:
    stream.request = NULL
    stream.group.in_flight -= 1


cdef bint place_probed(Stream *stream, const uint8_t *head, size_t size, size_t message_size, Place *place) noexcept nogil:
    """A buffer for all but the first bytes of the message."""
    cdef size_t at = (<size_t *> stream.connection.owner)[0]
    if at > size:
        return False
    place.buffer = place.data = new_buffer(message_size - at, 0)
    place.at = at
    return place.buffer != NULL


cdef class SessionProbe:
    """One server session as unit tests see it; the test plays the driver and the client's socket."""

    cdef Group *group
    cdef Connection *connection
    cdef size_t rest_at
    cdef bint is_closed

    def __cinit__(self, *, bytes fast_path=b"/fast/Call", ConnectionRules rules=None, ServerLedger ledger=None,
                  uint32_t packed_encodings=0, size_t rest_at=0, **limits):
        cdef SessionLimits bounds = SessionLimits(**{**_SMALL_LIMITS, **limits})
        self.group = new_group(&bounds.limits, <const uint8_t *> PyBytes_AS_STRING(fast_path), len(fast_path),
                               abandon_probed)
        if self.group == NULL:
            raise MemoryError
        if rules is not None:
            set_rules(self.group, &rules.rules, ledger.ledger if ledger is not None else NULL, packed_encodings)
        self.rest_at = rest_at
        if rest_at:
            self.group.place_rest = place_probed
        self.connection = open_connection(self.group, &self.rest_at)
        if self.connection == NULL or (rules is not None and begin_life(self.connection, 1) < 0):
            raise MemoryError

    def __dealloc__(self):
        cdef uint32_t events
        cdef Stream *stream
        if self.connection != NULL:
            close_connection(self.connection)
            while True:
                stream = take_event(self.connection, &events)
                if stream == NULL:
                    break
                stream.owner = NULL
                release_stream(stream)
            free_connection(self.connection)
        if self.group != NULL:
            release_group(self.group)

    cdef Stream *_stream(self, int stream_id) except NULL:
        cdef Stream *stream = self.connection.streams
        while stream != NULL and stream.id != stream_id:
            stream = stream.older
        if stream == NULL:
            raise KeyError(stream_id)
        return stream

    cdef uint8_t *_frame(self, bytes message) except NULL:
        cdef uint8_t *frame = new_buffer(FRAME_PREFIX_BYTES + <size_t> len(message), 0)
        if frame == NULL:
            raise MemoryError
        put_frame_prefix(frame, len(message))
        memcpy(frame + FRAME_PREFIX_BYTES, PyBytes_AS_STRING(message), len(message))
        return frame

    def feed(self, bytes data, int64_t now_ns=1):
        """Takes what the client sent; False when the session is broken."""
        return feed(self.connection, <const uint8_t *> PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data), now_ns) == 0

    def land(self, bytes data, int64_t now_ns=1, size_t linear_bytes=512, bint is_guessing=True):
        """Takes what the client sent as an I/O thread does: messages straight where they belong, the rest through a
        buffer of `linear_bytes`. The bytes of each step, False where the session is broken."""
        cdef Landing landing
        cdef const uint8_t *at = <const uint8_t *> PyBytes_AS_STRING(data)
        cdef size_t left = <size_t> PyBytes_GET_SIZE(data)
        cdef size_t n, taken
        cdef uint8_t *linear = <uint8_t *> malloc(MAX_LANDING_BYTES + 64)
        cdef int result
        if linear == NULL:
            raise MemoryError
        steps = []
        while left:
            if not is_guessing:
                self.connection.landing_bytes = 0
            if plan_landing(self.connection, &landing, linear + MAX_LANDING_BYTES, 64):
                taken = 0
                for i in range(landing.n):
                    n = min(landing.pieces[i].iov_len, left - taken)
                    memcpy(landing.pieces[i].iov_base, at + taken, n)
                    taken += n
                result = feed_landing(self.connection, &landing, taken, linear, now_ns)
            else:
                taken = min(min(left, linear_bytes), <size_t> MAX_LANDING_BYTES)
                memcpy(linear, at, taken)
                result = feed(self.connection, linear, taken, now_ns)
                memset(linear, 0xEE, taken)
            if result < 0:
                free(linear)
                return False
            at += taken
            left -= taken
            steps.append(taken)
        free(linear)
        return steps

    def collect(self, size_t capacity=MIN_COLLECT_BYTES):
        """Everything there is to send, collected in pieces of at most ``capacity`` bytes; None when broken."""
        cdef uint8_t *buffer = <uint8_t *> malloc(capacity)
        cdef Py_ssize_t n
        if buffer == NULL:
            raise MemoryError
        parts = []
        try:
            while True:
                n = collect(self.connection, buffer, capacity)
                if n < 0:
                    return None
                if n == 0:
                    return b"".join(parts)
                parts.append(PyBytes_FromStringAndSize(<char *> buffer, n))
        finally:
            free(buffer)

    def take_ready(self):
        """Complete fast messages as (stream id, message, deadline); each counts as a request in flight from now on."""
        ready = []
        cdef Stream *stream = take_ready(self.connection)
        while stream != NULL:
            if join_message(stream) < 0:
                raise MemoryError
            ready.append((stream.id, PyBytes_FromStringAndSize(<char *> stream.message, stream.message_size),
                          stream.deadline.due_ns))
            drop_buffer(stream.message)
            stream.message = NULL
            stream.request = <void *> stream
            self.group.in_flight += 1
            stream = take_ready(self.connection)
        return ready

    def turn_away(self):
        """Makes all ready streams slow calls, as a driver does whose router declined."""
        cdef Stream *stream = take_ready(self.connection)
        while stream != NULL:
            make_slow(stream)
            stream = take_ready(self.connection)

    def take_events(self):
        """What happened to slow calls: (stream id, event bits)."""
        events = []
        cdef uint32_t bits
        cdef Stream *stream = take_event(self.connection, &bits)
        while stream != NULL:
            events.append((stream.id, bits))
            stream.owner = NULL if bits & EVENT_OVER else <void *> stream
            if bits & EVENT_OVER:
                release_stream(stream)
            stream = take_event(self.connection, &bits)
        return events

    def metadata(self, int stream_id):
        """Names and values as they came, the path among them."""
        cdef Stream *stream = self._stream(stream_id)
        return unpack_metadata(stream.metadata, stream.metadata_size)

    def take_message(self, int stream_id):
        """The next message of a slow call as (bytes, compressed), or None."""
        cdef Message *message = take_message(self._stream(stream_id))
        if message == NULL:
            return None
        data = PyBytes_FromStringAndSize(<char *> message.data, message.size)
        is_compressed = bool(message.is_compressed)
        free_message(message)
        return data, is_compressed

    def answer(self, int stream_id, bytes message):
        """One message and OK, as a settled request is answered."""
        cdef Stream *stream = self._stream(stream_id)
        if stream.request != NULL:
            abandon_probed(stream)
        answer_stream(stream, self._frame(message), FRAME_PREFIX_BYTES + len(message), NULL)

    def fail(self, int stream_id, int status, bytes text):
        """A status without a message."""
        fail_stream(self._stream(stream_id), status, <const uint8_t *> PyBytes_AS_STRING(text), len(text))

    def send_head(self, int stream_id, metadata):
        """Initial metadata, pairs of bytes."""
        cdef bytes packed = pack_metadata(metadata)
        send_head(self._stream(stream_id), <const uint8_t *> PyBytes_AS_STRING(packed), len(packed))

    def send_message(self, int stream_id, bytes message, bint wants_writable=False):
        """One more message; gives the bytes of the stream that wait to be sent."""
        cdef Stream *stream = self._stream(stream_id)
        send_message(stream, self._frame(message), FRAME_PREFIX_BYTES + len(message))
        stream.wants_writable = wants_writable
        return stream.unsent_bytes

    def finish(self, int stream_id, int status, bytes text, trailing=()):
        """Ends a slow call and lets go of it."""
        cdef bytes packed = pack_metadata(trailing)
        cdef Stream *stream = self._stream(stream_id)
        finish_stream(stream, status, <const uint8_t *> PyBytes_AS_STRING(text), len(text),
                      <const uint8_t *> PyBytes_AS_STRING(packed), len(packed))
        detach_owner(stream)

    def expire(self, int64_t now_ns):
        """Expires what is due; gives the ids."""
        expired = []
        cdef Stream *stream = <Stream *> take_due(&self.group.deadlines, now_ns)
        while stream != NULL:
            expired.append(stream.id)
            expire_stream(stream)
            stream = <Stream *> take_due(&self.group.deadlines, now_ns)
        return expired

    def tend(self, int64_t now_ns):
        """Does what the connection's life asks for at that time; gives the next, 0 for never."""
        while tend_due(self.group, now_ns) != NULL:
            pass
        return next_tending(self.group)

    def drain(self):
        """Starts the two-step GOAWAY."""
        drain_connection(self.connection)

    def finish_drain(self):
        """Its second step, without waiting for the client."""
        finish_drain(self.connection)

    def close(self):
        """The socket is gone: ends all streams."""
        close_connection(self.connection)

    @property
    def is_over(self):
        """Whether the socket should be closed."""
        return bool(is_over(self.connection))

    @property
    def books(self):
        """The session's counts: streams, in_flight, partial, unread, withheld, outbound bytes, next deadline."""
        return {
            "streams": self.connection.n_streams, "in_flight": self.group.in_flight,
            "partial_bytes": self.connection.partial_bytes, "unread_bytes": self.connection.unread_bytes,
            "withheld_bytes": self.connection.withheld_bytes, "outbound_bytes": self.connection.outbound_bytes,
            "next_deadline_ns": next_due(&self.group.deadlines),
        }
