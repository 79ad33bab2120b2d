"""A call of the asyncio driver; see aio_call.pxd."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t

from aiorch_server._core.call cimport Call
from aiorch_server._core.h2_answer cimport finish_stream, send_head, send_message
from aiorch_server._core.h2_request cimport take_message
from aiorch_server._core.h2_stream cimport Message, detach_owner, free_message


cdef class CallCarrier:
    """What a call needs of its connection."""

    cdef int mark_dirty(self) except -1:
        """Has the connection looked at when the loop's tick ends; the driver's part."""
        raise NotImplementedError


cdef class StreamCall(Call):
    """A call whose stream lives on the same thread."""

    cdef int open(self, CallCarrier carrier, Stream *stream) except -1:
        self.carrier = carrier
        self.loop = carrier.loop
        self.describe(stream.metadata, stream.metadata_size, <int> stream.encoding, stream.accepted,
                      stream.deadline.due_ns)
        self.stream = stream
        stream.owner = <void *> self
        Py_INCREF(self)
        return 0

    cdef bint is_linked(self):
        return self.stream != NULL

    cdef bint has_message(self):
        return self.stream.inbox_head != NULL

    cdef object pop_message(self):
        cdef Message *message = take_message(self.stream)
        if message == NULL:
            return None
        try:
            return PyBytes_FromStringAndSize(<char *> message.data, message.size), bool(message.is_compressed)
        finally:
            free_message(message)
            self.carrier.mark_dirty()

    cdef bint has_much_unsent(self):
        return self.stream.unsent_bytes > self.stream.group.limits.high_water_bytes

    cdef int ask_writable(self) except -1:
        self.stream.wants_writable = True
        return 0

    cdef int put_head(self, bytes packed) except -1:
        send_head(self.stream, <const uint8_t *> PyBytes_AS_STRING(packed), <size_t> PyBytes_GET_SIZE(packed))
        return self.carrier.mark_dirty()

    cdef int put_frame(self, uint8_t *frame, size_t size) except -1:
        send_message(self.stream, frame, size)
        return self.carrier.mark_dirty()

    cdef int put_end(self, int code, bytes text, bytes packed) except -1:
        cdef Stream *stream = self.stream
        self.stream = NULL
        finish_stream(stream, code, <const uint8_t *> PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text),
                      <const uint8_t *> PyBytes_AS_STRING(packed), PyBytes_GET_SIZE(packed))
        detach_owner(stream)
        Py_DECREF(self)
        return self.carrier.mark_dirty()

    cdef str name_peer(self):
        return self.carrier.peer_name

    cdef object look_up(self, name):
        return self.carrier.transport.get_extra_info(name)
