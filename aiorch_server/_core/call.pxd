# One call on the Python plane, as bytes: what the drivers of the gRPC sessions hand to Python.
#
# The class says what servicers may do and when they are woken; a driver's subclass says how it gets to the stream.
# Ownership: an open call is kept alive by its driver. The tie is cut once: by finish(), or by the driver with end().
# A call without a stream drops whatever is sent. Everything runs on the loop's thread.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t


cdef class Call:
    cdef object loop
    cdef readonly str path
    cdef readonly list metadata
    cdef readonly str encoding
    cdef readonly frozenset accepted
    cdef readonly int64_t deadline_ns
    cdef readonly tuple choice      # version, and whether it is in the sample; None: nothing was chosen
    cdef readonly bint is_half_closed
    cdef readonly bint is_over
    cdef bint is_head_sent
    cdef object over_callback
    cdef object readable            # futures, or None
    cdef object writable

    # --- for the driver
    cdef int describe(self, const uint8_t *packed, size_t size, int encoding, uint32_t accepted,
                      int64_t deadline_ns) except -1
    cdef void end(self)
    cdef int wake_reader(self) except -1
    cdef int wake_writer(self) except -1

    # --- the driver's part; put_* and ask_writable only while is_linked
    cdef bint is_linked(self)
    cdef bint has_message(self)
    cdef object pop_message(self)
    cdef bint has_much_unsent(self)
    # wake_writer() when the client has taken enough
    cdef int ask_writable(self) except -1
    cdef int put_head(self, bytes packed) except -1
    # `frame` is malloc'd and the driver's from now on
    cdef int put_frame(self, uint8_t *frame, size_t size) except -1
    cdef int put_end(self, int code, bytes text, bytes packed) except -1
    cdef str name_peer(self)
    cdef object look_up(self, name)
