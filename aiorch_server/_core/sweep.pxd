# Requests whose time is over are answered while all instances are busy, too: one thread looks after all schedulers.
#
# An instance that waits inside take wakes up for them itself; the sweeper comes only where none does. It goes by each
# scheduler's `sweep_ns`, sleeps until the earliest, and comes to a scheduler every SWEEP_NS at most.
# Locks: the sweeper's own is taken before a scheduler's, never after it.

from libc.stdint cimport int64_t, uint64_t

from aiorch_server._core.request cimport Request
from aiorch_server._core.scheduler_state cimport SchedulerState

cdef enum:
    SWEEP_NS = 5000000


# From here on it is looked after, until `leave_sweeper`; whoever calls these keeps a reference in between. Starts the
# thread, for Python with the interpreter lock.
cdef object join_sweeper(SchedulerState *state)
cdef void leave_sweeper(SchedulerState *state) noexcept nogil
# Some scheduler's `sweep_ns` is earlier than it was; without any lock.
cdef void call_sweeper(int64_t at_ns) noexcept nogil

# A chain was taken out of the queue to be refused: no longer counted nor cancellable there. Under the scheduler's lock.
cdef void mark_unserved(SchedulerState *state, Request *request, uint64_t *counted) noexcept nogil

# Whether the sweeper must be called for a request that was just queued, and notes when; under the scheduler's lock.
cdef inline bint must_be_swept(SchedulerState *state, const Request *request) noexcept nogil:
    cdef int64_t at_ns = request.expires_ns
    if request.deadline_ns and (at_ns == 0 or request.deadline_ns < at_ns):
        at_ns = request.deadline_ns
    if state.policy.is_shedding and request.end_ns and (at_ns == 0 or request.end_ns < at_ns):
        at_ns = request.end_ns
    if at_ns == 0 or state.sweep_ns and at_ns >= state.sweep_ns:
        return False
    at_ns = max(at_ns, state.swept_ns + SWEEP_NS)
    if state.sweep_ns and at_ns >= state.sweep_ns:
        return False
    state.sweep_ns = at_ns
    return True
