"""One call on the Python plane, as bytes; see aio_call.pxd."""

import logging

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from aiorch_server._core.grpc_text cimport put_frame_prefix
from aiorch_server._core.h2_answer cimport finish_stream, send_head, send_message
from aiorch_server._core.h2_request cimport take_message
from aiorch_server._core.h2_stream cimport (
    FRAME_PREFIX_BYTES,
    Message,
    detach_owner,
    free_message,
    pack_metadata,
    unpack_metadata,
)
from aiorch_server._core.request cimport now_ns

logger = logging.getLogger(__name__)

cdef tuple ENCODINGS = ("identity", "gzip", "deflate")     # as StreamEncoding numbers them
cdef size_t MAX_FRAME_BYTES = 0xFFFFFFFF


cdef class CallCarrier:
    """What a call needs of its connection."""

    cdef int mark_dirty(self) except -1:
        """Has the connection looked at when the loop's tick ends; the driver's part."""
        raise NotImplementedError


cdef class Call:
    """One call on the Python plane, as bytes; made by the driver and passed to ``on_call``.

    ``metadata`` are the request's header pairs as bytes, without those that gRPC itself uses. All methods belong to
    the loop's thread. When the call is over before ``finish`` (cancelled, expired, connection lost), the callback is
    called once, and everything sent later is dropped without an error.
    """

    cdef int open(self, CallCarrier carrier, Stream *stream) except -1:
        self.carrier = carrier
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
        return self.carrier.peer_name

    def get_extra_info(self, name):
        """What the transport knows: ``ssl_object``, ``peercert``, ``sockname`` and so on."""
        return self.carrier.transport.get_extra_info(name)

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
            self.carrier.mark_dirty()

    def wait_readable(self):
        """A future that is done when ``take_message`` is worth another try. RuntimeError: another read is waiting."""
        waiter = self.carrier.loop.create_future()
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
        return self.stream != NULL and self.stream.unsent_bytes > self.stream.group.limits.high_water_bytes

    def wait_writable(self):
        """A future that is done when the client has taken enough. RuntimeError: another writer is waiting."""
        waiter = self.carrier.loop.create_future()
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
            self.carrier.mark_dirty()

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
        self.carrier.mark_dirty()

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
        self.carrier.mark_dirty()
