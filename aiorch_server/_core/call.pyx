"""One call on the Python plane, as bytes; see call.pxd."""

import logging

from libc.string cimport memcpy

from aiorch_server._core.buffers cimport new_buffer
from aiorch_server._core.grpc_text cimport put_frame_prefix
from aiorch_server._core.h2_stream cimport FRAME_PREFIX_BYTES, pack_metadata, unpack_metadata
from aiorch_server._core.request cimport now_ns
from aiorch_server._core.shares cimport Choice

logger = logging.getLogger(__name__)

cdef tuple ENCODINGS = ("identity", "gzip", "deflate")     # as StreamEncoding numbers them
cdef tuple ACCEPTED = tuple(
    [frozenset([name for number, name in enumerate(ENCODINGS) if number and bits >> number & 1]) for bits in range(8)])
cdef size_t MAX_FRAME_BYTES = 0xFFFFFFFF


cdef class Call:
    """One call on the Python plane, as bytes; made by the driver and passed to ``on_call``.

    ``encoding`` names that of compressed requests, ``accepted`` those that the client takes beside identity.
    ``metadata`` are the request's header pairs as bytes, without those that gRPC itself uses. ``choice`` is the version
    that the route table chose for a request which it did not carry, see shares.pxd. All methods belong to the loop's
    thread. When the call is over before ``finish`` (cancelled, expired, connection lost), the callback is
    called once, and everything sent later is dropped without an error.
    """

    cdef int describe(self, const uint8_t *packed, size_t size, int encoding, uint32_t accepted,
                      int64_t deadline_ns) except -1:
        cdef Choice choice
        self.path = ""
        self.metadata = []
        for pair in unpack_metadata(packed, size):
            if pair[0] == b":path":
                self.path = pair[1].decode("latin-1")
            elif pair[0] == b":choice":
                memcpy(&choice, <const char *> pair[1], sizeof(Choice))
                self.choice = choice.version, bool(choice.is_sampled)
            else:
                self.metadata.append(pair)
        self.encoding = ENCODINGS[encoding]
        self.accepted = ACCEPTED[accepted & 7]
        self.deadline_ns = deadline_ns
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

    # ---------------------------------------------------------------------------------------------- the driver's part
    cdef bint is_linked(self):
        return False

    cdef bint has_message(self):
        return False

    cdef object pop_message(self):
        return None

    cdef bint has_much_unsent(self):
        return False

    cdef int ask_writable(self) except -1:
        raise NotImplementedError

    cdef int put_head(self, bytes packed) except -1:
        raise NotImplementedError

    cdef int put_frame(self, uint8_t *frame, size_t size) except -1:
        raise NotImplementedError

    cdef int put_end(self, int code, bytes text, bytes packed) except -1:
        raise NotImplementedError

    cdef str name_peer(self):
        raise NotImplementedError

    cdef object look_up(self, name):
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------------- the door's
    def set_over_callback(self, callback):
        """``callback()`` runs when the call is over before ``finish``; at once if it is over already."""
        if self.is_over:
            callback()
        else:
            self.over_callback = callback

    @property
    def peer(self):
        """The client's address as gRPC writes it: ``ipv4:127.0.0.1:5000``, ``ipv6:%5B::1%5D:5000``, ``unix:``."""
        return self.name_peer()

    def get_extra_info(self, name):
        """What is known of the transport; None where nothing is.

        ``tls_peer``: the client's certificate in DER, or None, and whether an earlier session was resumed; on an I/O
        thread. ``ssl_object``, ``socket`` and so on: on the loop.
        """
        return self.look_up(name)

    def time_remaining(self):
        """Seconds until the deadline, not below 0; None without a deadline."""
        if self.deadline_ns == 0:
            return None
        return max(0, self.deadline_ns - now_ns()) / 1e9

    def take_message(self):
        """The next complete message as ``(bytes, is_compressed)``, or None when there is none (yet)."""
        return self.pop_message() if self.is_linked() else None

    def wait_readable(self):
        """A future that is done when ``take_message`` is worth another try. RuntimeError: another read is waiting."""
        waiter = self.loop.create_future()
        if not self.is_linked() or self.is_half_closed or self.has_message():
            waiter.set_result(None)
            return waiter
        if self.readable is not None and not self.readable.done():
            raise RuntimeError("only one read at a time: another one is still waiting")
        self.readable = waiter
        return waiter

    @property
    def is_congested(self):
        """Whether so much is unsent that a writer should wait."""
        return self.is_linked() and self.has_much_unsent()

    def wait_writable(self):
        """A future that is done when the client has taken enough. RuntimeError: another writer is waiting."""
        waiter = self.loop.create_future()
        if not self.is_congested:
            waiter.set_result(None)
            return waiter
        if self.writable is not None and not self.writable.done():
            raise RuntimeError("only one write at a time: another one is still waiting")
        self.ask_writable()
        self.writable = waiter
        return waiter

    def send_initial_metadata(self, metadata):
        """Sends the response headers with these pairs of bytes. RuntimeError: they were sent already."""
        cdef bytes packed = pack_metadata(metadata)
        if self.is_head_sent:
            raise RuntimeError("initial metadata was sent already")
        self.is_head_sent = True
        if self.is_linked():
            self.put_head(packed)

    @property
    def has_begun(self):
        """Whether response headers are sent."""
        return bool(self.is_head_sent)

    def send_message(self, message, bint is_compressed=False):
        """Queues one response message, any bytes-like object, which is copied. ValueError above 4 GiB.

        One that ``is_compressed`` needs ``grpc-encoding`` among the initial metadata.
        """
        cdef const uint8_t[::1] view = message
        cdef size_t size = <size_t> view.shape[0]
        cdef uint8_t *frame
        if not self.is_linked():
            return
        if size > MAX_FRAME_BYTES:
            raise ValueError(f"a gRPC message ends at 4294967295 bytes, this one has {size}")
        frame = new_buffer(FRAME_PREFIX_BYTES + size, 0)
        if frame == NULL:
            raise MemoryError
        put_frame_prefix(frame, size)
        frame[0] = is_compressed
        if size:
            memcpy(frame + FRAME_PREFIX_BYTES, &view[0], size)
        self.is_head_sent = True
        self.put_frame(frame, FRAME_PREFIX_BYTES + size)

    def finish(self, int code, str details="", trailing_metadata=()):
        """Ends the call; nothing happens when it is over or finished already."""
        cdef bytes text
        cdef bytes packed
        if not self.is_linked():
            return
        text = details.encode("utf-8", "replace")
        packed = pack_metadata(trailing_metadata)
        self.over_callback = None
        self.put_end(code, text, packed)
        self.wake_reader()
        self.wake_writer()
