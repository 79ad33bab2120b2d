# A call of the asyncio driver: session and servicer share the loop's thread, so it works on its stream at once.
#
# Ownership: while a stream is open its `owner` is a strong reference to its call, and the call's `stream` points back.
# The tie is cut once, on both sides: by finish(), or by the driver with EVENT_OVER followed by end().

from aiorch_server._core.call cimport Call
from aiorch_server._core.h2_stream cimport Stream


cdef class CallCarrier:
    cdef object loop
    cdef object transport           # asyncio's, set when the connection is made
    cdef str peer_name

    cdef int mark_dirty(self) except -1


cdef class StreamCall(Call):
    cdef Stream *stream             # NULL once finished or over
    cdef CallCarrier carrier

    cdef int open(self, CallCarrier carrier, Stream *stream) except -1
