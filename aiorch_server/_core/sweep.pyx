"""The thread that answers what is overdue while instances are busy; see sweep.pxd."""

import threading

from aiorch_server._core.forecast cimport find_pause
from aiorch_server._core.levels cimport count_out, delay_expired
from aiorch_server._core.queue cimport remove_expired, remove_overdue
from aiorch_server._core.request cimport (
    REQUEST_RUNNING,
    now_ns,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_t,
    pthread_mutex_unlock,
)
from aiorch_server._core.scheduler_state cimport (
    init_condition,
    pthread_cond_signal,
    pthread_cond_t,
    release_scheduler,
    retain_scheduler,
    wait_until,
)
from aiorch_server._core.settlement cimport refuse_chain, refuse_late

# It looks so often by itself: glibc can lose a wake-up (its bug 25847).
cdef int64_t MAX_NAP_NS = 1000000000


cdef struct Sweeper:
    pthread_mutex_t lock            # guards all of it
    pthread_cond_t called
    SchedulerState *first           # those that are looked after, linked by `next_swept`
    int64_t wake_ns                 # when it looks next


cdef Sweeper sweeper
pthread_mutex_init(&sweeper.lock, NULL)
init_condition(&sweeper.called)
_thread = None


cdef void mark_unserved(SchedulerState *state, Request *request, uint64_t *counted) noexcept nogil:
    while request != NULL:
        counted[0] += 1
        count_out(&state.levels, request)
        request.state = REQUEST_RUNNING
        request = request.next


cdef void sweep(SchedulerState *state) noexcept nogil:
    """Refuses what is overdue in one queue, and says when to come again."""
    cdef Request *expired = NULL
    cdef Request *late = NULL
    cdef int64_t now = now_ns(), next_ns = 0, pause_ns = 0
    pthread_mutex_lock(&state.lock)
    if state.waiting == 0 and state.queue.n:
        expired = remove_expired(&state.queue, now)
        if expired != NULL and state.levels.has_delays:
            expired = delay_expired(&state.levels, &state.queue, expired, now)
        mark_unserved(state, expired, &state.observed.failed)
        if expired != NULL:
            pause_ns = find_pause(&state.queue, &state.policy)
        if state.policy.is_shedding and state.policy.curve.n:
            late = remove_overdue(&state.queue, now, &next_ns)
            mark_unserved(state, late, &state.observed.dropped_late)
    if state.queue.next_expiry_ns and (next_ns == 0 or state.queue.next_expiry_ns < next_ns):
        next_ns = state.queue.next_expiry_ns
    state.swept_ns = now
    state.sweep_ns = max(next_ns, now + SWEEP_NS) if state.queue.n and next_ns else 0
    pthread_mutex_unlock(&state.lock)
    refuse_chain(state, expired, 0, NULL, pause_ns)
    if late != NULL:
        refuse_late(state, late)


cdef SchedulerState *find_due(int64_t now, int64_t *wake_ns) noexcept nogil:
    """One to sweep now, or NULL, and when the first of all others is due; under the sweeper's lock."""
    cdef SchedulerState *state = sweeper.first
    cdef int64_t at_ns
    wake_ns[0] = now + MAX_NAP_NS
    while state != NULL:
        pthread_mutex_lock(&state.lock)
        at_ns = state.sweep_ns
        pthread_mutex_unlock(&state.lock)
        if at_ns and at_ns <= now:
            return state
        if at_ns:
            wake_ns[0] = min(wake_ns[0], at_ns)
        state = state.next_swept
    return NULL


cdef void run_sweeper() noexcept nogil:
    cdef SchedulerState *due
    cdef int64_t wake_ns
    pthread_mutex_lock(&sweeper.lock)
    while True:
        due = find_due(now_ns(), &wake_ns)
        if due == NULL:
            sweeper.wake_ns = wake_ns
            wait_until(&sweeper.called, &sweeper.lock, wake_ns)
            continue
        retain_scheduler(due)       # who joined it still has a reference, as long as the lock is held
        pthread_mutex_unlock(&sweeper.lock)
        sweep(due)
        release_scheduler(due)
        pthread_mutex_lock(&sweeper.lock)


def _run():
    with nogil:
        run_sweeper()


cdef object join_sweeper(SchedulerState *state):
    global _thread
    with nogil:
        pthread_mutex_lock(&sweeper.lock)
        state.next_swept = sweeper.first
        sweeper.first = state
        pthread_mutex_unlock(&sweeper.lock)
    if _thread is None:
        _thread = threading.Thread(target=_run, name="sweeper", daemon=True)
        _thread.start()


cdef void leave_sweeper(SchedulerState *state) noexcept nogil:
    cdef SchedulerState **link = &sweeper.first
    pthread_mutex_lock(&sweeper.lock)
    while link[0] != NULL and link[0] != state:
        link = &link[0].next_swept
    if link[0] != NULL:
        link[0] = state.next_swept
    pthread_mutex_unlock(&sweeper.lock)


cdef void call_sweeper(int64_t at_ns) noexcept nogil:
    pthread_mutex_lock(&sweeper.lock)
    if at_ns < sweeper.wake_ns:
        sweeper.wake_ns = at_ns
        pthread_cond_signal(&sweeper.called)
    pthread_mutex_unlock(&sweeper.lock)
