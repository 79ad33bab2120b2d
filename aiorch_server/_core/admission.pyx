"""Requests enter the queue, or are refused; those that still wait can be taken back."""

from libc.stdint cimport uint8_t
from libc.string cimport memcpy

from aiorch_server._core.arrivals cimport forget_arrival, note_arrival
from aiorch_server._core.batch_former cimport find_end
from aiorch_server._core.buffers cimport drop_buffer
from aiorch_server._core.fairness cimport make_room, make_time
from aiorch_server._core.forecast cimport MAX_FORETOLD, Forecast, find_pause, foretell
from aiorch_server._core.levels cimport LevelPolicy, count_out, policy_of, set_expiry, set_level
from aiorch_server._core.observation cimport count_arrival
from aiorch_server._core.queue cimport push_request, remove_request
from aiorch_server._core.request cimport (
    REQUEST_NEW,
    REQUEST_QUEUED,
    REQUEST_RUNNING,
    mark_cancelled,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from aiorch_server._core.scheduler_state cimport list_free, release_scheduler, retain_scheduler
from aiorch_server._core.settlement cimport fail_full, fail_late, refuse_displaced, settle_taken_back
from aiorch_server._core.slabs cimport reserve_rows
from aiorch_server._core.sweep cimport call_sweeper, must_be_swept


cdef void drop_scheduler(void *state) noexcept nogil:
    release_scheduler(<SchedulerState *> state)


cdef bint is_too_late(SchedulerState *state, Request *request, int64_t now, Forecast *forecast,
                      Request **displaced) noexcept nogil:
    """Whether it would be answered after its end, as far as one knows, whoever may have made way; under the lock."""
    cdef int64_t free_ns[MAX_FORETOLD]
    cdef int64_t free_again[MAX_FORETOLD]
    cdef int n
    if state.policy.curve.n == 0 or request.end_ns == 0:
        return False
    n = list_free(state, free_ns, now)
    if request.tenant:
        memcpy(free_again, free_ns, sizeof(free_ns))
    foretell(&state.queue, &state.policy, request, free_ns, n, now, forecast)
    if forecast.late_ns > 0 and request.tenant:
        displaced[0] = make_time(&state.queue, &state.policy, request, free_again, n, now, forecast)
        take_leave(state, displaced[0], &state.observed.dropped_late)
    return forecast.late_ns > 0


cdef bint has_room(SchedulerState *state, const LevelPolicy *policy, const Request *request,
                   Request **displaced) noexcept nogil:
    """Whether there is a place for it, which somebody may have left; under the lock."""
    cdef bint is_level_full = policy.max_requests and policy.n >= policy.max_requests
    cdef int64_t n_bytes = 0
    if state.queue.n > 0:
        n_bytes = max(n_bytes, state.queue.n_bytes + <int64_t> request.message_size - state.max_bytes)
    if state.queue.n < state.max_requests and not is_level_full and n_bytes == 0:
        return True
    if request.tenant == 0 or displaced[0] != NULL:
        return False
    displaced[0] = make_room(&state.queue, &state.policy, request, is_level_full, n_bytes)
    take_leave(state, displaced[0], &state.observed.refused_full)
    return displaced[0] != NULL


cdef void take_leave(SchedulerState *state, Request *displaced, uint64_t *counted) noexcept nogil:
    """Those were taken out of the queue: no longer counted nor cancellable there."""
    while displaced != NULL:
        counted[0] += 1
        count_out(&state.levels, displaced)
        displaced.state = REQUEST_RUNNING
        displaced = displaced.next


cdef EnqueueResult enqueue(SchedulerState *state, Request *request, uint64_t priority, int64_t timeout_us,
                           int64_t now) noexcept nogil:
    cdef EnqueueResult result = ENQUEUED
    cdef LevelPolicy *policy
    cdef Forecast forecast
    cdef Request *displaced = NULL
    cdef int64_t pause_ns = 0
    cdef int64_t sweep_ns = 0
    if not set_level(&state.levels, request, priority):
        return REFUSED_LEVEL
    policy = policy_of(&state.levels, request)
    set_expiry(policy, request, timeout_us, now)
    request.enqueued_ns = now
    if request.received_ns == 0:
        request.received_ns = now
    pthread_mutex_lock(&state.lock)
    request.end_ns = find_end(&state.policy, request)
    if state.is_closed:
        result = REFUSED_CLOSED
    elif state.policy.is_shedding and is_too_late(state, request, now, &forecast, &displaced):
        result = REFUSED_LATE
        count_arrival(&state.observed, request.rows, now)
        state.observed.refused_late += 1
    elif not has_room(state, policy, request, &displaced) or not push_request(&state.queue, request):
        result = REFUSED_FULL
        pause_ns = find_pause(&state.queue, &state.policy)
        count_arrival(&state.observed, request.rows, now)
        state.observed.refused_full += 1
    else:
        count_arrival(&state.observed, request.rows, now)
        request.state = REQUEST_QUEUED
        request.scheduler = state
        request.drop_scheduler = drop_scheduler
        retain_scheduler(state)
        state.in_flight += 1
        if state.levels.is_bounded:
            policy.n += 1
        if state.keeps_order:
            note_arrival(&state.arrivals, request)
        if must_be_swept(state, request):
            sweep_ns = state.sweep_ns
    pthread_mutex_unlock(&state.lock)
    if displaced != NULL:
        refuse_displaced(state, displaced)
    if sweep_ns:
        call_sweeper(sweep_ns)
    if result == REFUSED_LATE:
        request.retry_after_ns = forecast.late_ns
        fail_late(request, forecast.finish_ns)
    elif result == REFUSED_FULL:
        request.retry_after_ns = pause_ns
        fail_full(request)
    return result


cdef bint reserve_in_slab(SchedulerState *state, size_t row_bytes, int64_t rows, Place *place) noexcept nogil:
    cdef bint is_reserved = False
    cdef uint8_t *dropped = NULL
    pthread_mutex_lock(&state.lock)
    if state.takes_rows and not state.is_closed:
        is_reserved = reserve_rows(&state.slab, row_bytes, rows, place, &dropped)
    pthread_mutex_unlock(&state.lock)
    drop_buffer(dropped)
    return is_reserved


cdef bint cancel_request(Request *request) noexcept nogil:
    cdef SchedulerState *state = <SchedulerState *> request.scheduler
    cdef bint was_queued = False
    if state == NULL:       # refused at once: it is in its sink
        return False
    pthread_mutex_lock(&state.lock)
    if request.state == REQUEST_QUEUED:
        remove_request(&state.queue, request)
        count_out(&state.levels, request)
        state.observed.failed += 1
        if state.keeps_order:
            forget_arrival(&state.arrivals, request)
        request.state = REQUEST_NEW
        was_queued = True
    else:
        mark_cancelled(request)
    pthread_mutex_unlock(&state.lock)
    if was_queued:
        settle_taken_back(state, request)
    return was_queued
