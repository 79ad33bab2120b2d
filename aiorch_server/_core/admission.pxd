# The way into a scheduler's queue, for doors and mailboxes, and back out of it for who gives up.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

from aiorch_server._core.buffers cimport Place
from aiorch_server._core.request cimport Request
from aiorch_server._core.scheduler_state cimport SchedulerState


cdef enum EnqueueResult:
    ENQUEUED = 0
    REFUSED_FULL = 1        # the request is failed with words and a time to try again
    REFUSED_CLOSED = 2
    REFUSED_LEVEL = 3       # a priority above the configured levels
    REFUSED_LATE = 4        # it could not be answered in time: as for REFUSED_FULL


# Puts a bound request into the queue; priority and timeout as the caller gave them, 0 for none. On ENQUEUED the queue
# owns it; else it is still the caller's. Wakes nobody. Requests of tenants that hold more may be refused in its place.
cdef EnqueueResult enqueue(SchedulerState *state, Request *request, uint64_t priority, int64_t timeout_us,
                           int64_t now) noexcept nogil
# Rows of the slab for a tensor that is coming in; see slabs.reserve_rows. False: there are none.
cdef bint reserve_in_slab(SchedulerState *state, size_t row_bytes, int64_t rows, Place *place) noexcept nogil
# True: the request was still queued, has left the queue and is the caller's again (free it with free_request).
# False: it is running or settled; it will come through its sink, and the caller may set `owner` to NULL meanwhile
# (owner is only read and written by the sink's thread).
cdef bint cancel_request(Request *request) noexcept nogil
