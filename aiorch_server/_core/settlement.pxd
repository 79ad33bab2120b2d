# The way out of a scheduler: requests that were answered, failed or taken back are counted out and go to their sinks.
#
# A request that leaves the queue other than by cancel_request passes through here once. Any thread, without locks.

from libc.stdint cimport int64_t

from aiorch_server._core.request cimport Request
from aiorch_server._core.scheduler_state cimport SchedulerState


# Hands a chain of requests, answered or failed and no longer queued, to their sinks, one by one or in runs.
cdef void settle_chain(SchedulerState *state, Request *first) noexcept nogil
# Fails a chain that was taken out of the queue unserved, and settles it. Status 0: each for the time that is over, its
# deadline or the queue's; the latter may come back after `pause_ns`. The caller has counted them out of their levels, under
# the lock.
cdef void refuse_chain(SchedulerState *state, Request *first, int status, const char *text,
                       int64_t pause_ns) noexcept nogil
# Fails a request, which is in no queue, because its answer would come at `finish_ns`; retry_after_ns says by how much that
# is too late. Settles nothing.
cdef void fail_late(Request *request, int64_t finish_ns) noexcept nogil
# Fails a request, which is in no queue, because there is no place in it, or out of memory. Settles nothing.
cdef void fail_full(Request *request) noexcept nogil
# Settles a chain of requests that made way for others.
cdef void refuse_displaced(SchedulerState *state, Request *first) noexcept nogil
# Settles a chain that remove_late took out.
cdef void refuse_late(SchedulerState *state, Request *first) noexcept nogil
# A request that was still queued goes back to its caller: counts it, and lets out whose answers waited for its own.
# The caller has taken it out of queue, level and arrivals, under the lock.
cdef void settle_taken_back(SchedulerState *state, const Request *request) noexcept nogil
