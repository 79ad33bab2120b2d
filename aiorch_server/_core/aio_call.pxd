# One call on the Python plane, as bytes: what the asyncio driver hands to Python.
#
# Ownership: while a stream is open its `owner` is a strong reference to its Call, and the Call's `stream` points back.
# The tie is cut once, on both sides: by finish(), or by the driver with EVENT_OVER followed by end(). A Call without
# a stream drops whatever is sent. Everything runs on the loop's thread.

from libc.stdint cimport int64_t

from aiorch_server._core.h2_stream cimport Stream


cdef class CallCarrier:
    cdef object loop
    cdef object transport           # asyncio's, set when the connection is made
    cdef str peer_name

    cdef int mark_dirty(self) except -1


cdef class Call:
    cdef Stream *stream             # NULL once finished or over
    cdef CallCarrier carrier
    cdef readonly str path
    cdef readonly list metadata
    cdef readonly str encoding
    cdef readonly int64_t deadline_ns
    cdef readonly bint is_half_closed
    cdef readonly bint is_over
    cdef bint is_head_sent
    cdef object over_callback
    cdef object readable            # futures, or None
    cdef object writable

    cdef int open(self, CallCarrier carrier, Stream *stream) except -1
    cdef void end(self)
    cdef int wake_reader(self) except -1
    cdef int wake_writer(self) except -1
