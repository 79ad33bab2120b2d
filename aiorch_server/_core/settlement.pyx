"""Failing what was not served, handing over what is settled, in the order of arrival where that is asked for."""

from libc.stdint cimport uint8_t
from libc.stdio cimport snprintf
from libc.string cimport memset

from aiorch_server._core.arrivals cimport take_settled
from aiorch_server._core.buffers cimport drop_buffer
from aiorch_server._core.counters cimport FAILURE_CANCELED, FAILURE_REJECTED, count_failure
from aiorch_server._core.request cimport (
    Stamps,
    now_ns,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    put_settled,
    refuse_request,
)
from aiorch_server._core.scheduler_state cimport pthread_cond_broadcast, release_scheduler, retain_scheduler
from aiorch_server._core.slabs cimport relax_slab
from aiorch_server._core.watch cimport note_slow

cdef enum:
    LEAST_RETRY_NS = 1000000

cdef int CANCELLED = 1
cdef int DEADLINE_EXCEEDED = 4
cdef int UNAVAILABLE = 14


cdef void leave(SchedulerState *state, int64_t n) noexcept nogil:
    """Counts `n` requests out; the caller holds a reference, the requests may be freed already."""
    cdef uint8_t *dropped = NULL
    pthread_mutex_lock(&state.lock)
    state.in_flight -= n
    if state.in_flight == 0:
        dropped = relax_slab(&state.slab)
        pthread_cond_broadcast(&state.idle)
    pthread_mutex_unlock(&state.lock)
    drop_buffer(dropped)


cdef void note_unserved(SchedulerState *state, const Request *request, int status, int64_t now) noexcept nogil:
    """Notes a request that left the queue without having run, if it took long."""
    cdef Stamps stamps
    if now - request.received_ns < state.watch.slow_ns:
        return
    memset(&stamps, 0, sizeof(stamps))
    stamps.received_ns, stamps.enqueued_ns, stamps.settled_ns = request.received_ns, request.enqueued_ns, now
    note_slow(&state.watch, request, &stamps, status)


cdef int64_t hand_over(Request *first) noexcept nogil:
    """Gives a chain to its sinks, in its order; how many they were."""
    cdef Request *last
    cdef Request *following
    cdef int64_t n = 0
    while first != NULL:
        last = first
        n += 1
        # a run of one sink is handed over with one wake-up
        while last.next != NULL and last.next.sink == first.sink:
            last = last.next
            n += 1
        following = last.next
        put_settled(first.sink, first, last)
        first = following
    return n


cdef void settle_in_order(SchedulerState *state, Request *settled) noexcept nogil:
    """Hands over what is settled and before which nothing is open; the rest waits. The caller holds a reference.

    One thread at a time hands over, for all: no lock is held meanwhile, because a sink that nobody drains frees requests
    at once, and that may need the interpreter lock, which another caller may hold.
    """
    cdef Request *first
    cdef int64_t n = 0
    pthread_mutex_lock(&state.lock)
    while settled != NULL:
        settled.is_settled = True
        settled = settled.next
    if not state.arrivals.is_handing_over:
        state.arrivals.is_handing_over = True
        first = take_settled(&state.arrivals)
        while first != NULL:
            pthread_mutex_unlock(&state.lock)
            n += hand_over(first)
            pthread_mutex_lock(&state.lock)
            first = take_settled(&state.arrivals)
        state.arrivals.is_handing_over = False
    pthread_mutex_unlock(&state.lock)
    if n:
        leave(state, n)


cdef void settle_chain(SchedulerState *state, Request *first) noexcept nogil:
    retain_scheduler(state)     # the owners may free all requests, and with them the last reference, meanwhile
    if state.keeps_order:
        settle_in_order(state, first)
    else:
        leave(state, hand_over(first))
    release_scheduler(state)


cdef void refuse_chain(SchedulerState *state, Request *first, int status, const char *text,
                       int64_t pause_ns) noexcept nogil:
    """Fails requests that were taken out of the queue unserved, each with its own words."""
    cdef Request *request = first
    cdef int64_t now = now_ns()
    if first == NULL:
        return
    while request != NULL:
        if status:
            refuse_request(request, status, text)
        elif request.deadline_ns and request.deadline_ns <= now:
            refuse_request(request, DEADLINE_EXCEEDED, b"Deadline Exceeded")
        else:
            refuse_request(request, UNAVAILABLE, b"Request timeout expired")
            request.retry_after_ns = pause_ns
        count_failure(&state.counters, request, FAILURE_REJECTED, now)
        note_unserved(state, request, request.status, now)
        request = request.next
    settle_chain(state, first)


cdef void fail_late(Request *request, int64_t finish_ns) noexcept nogil:
    cdef char text[192]
    cdef int64_t retry_ms
    request.retry_after_ns = max(request.retry_after_ns, <int64_t> LEAST_RETRY_NS)
    retry_ms = (request.retry_after_ns + 999999) // 1000000
    snprintf(text, sizeof(text), b"cannot be answered in time: it would take %.1f ms, and the %s %.1f ms; "
             b"try again in %lld.%03d s", <double> (finish_ns - request.received_ns) / 1e6,
             b"caller waits" if request.end_ns == request.deadline_ns else b"model's objective is",
             <double> (request.end_ns - request.received_ns) / 1e6, <long long> (retry_ms // 1000), <int> (retry_ms % 1000))
    refuse_request(request, UNAVAILABLE, text)


cdef void fail_full(Request *request) noexcept nogil:
    refuse_request(request, UNAVAILABLE, b"Exceeds maximum queue size")


cdef void refuse_displaced(SchedulerState *state, Request *first) noexcept nogil:
    cdef char text[128]
    cdef Request *request = first
    cdef int64_t now = now_ns()
    cdef int64_t retry_ms
    while request != NULL:
        retry_ms = (request.retry_after_ns + 999999) // 1000000
        snprintf(text, sizeof(text), b"made way in the queue for a tenant that has less in it; try again in %lld.%03d s",
                 <long long> (retry_ms // 1000), <int> (retry_ms % 1000))
        refuse_request(request, UNAVAILABLE, text)
        count_failure(&state.counters, request, FAILURE_REJECTED, now)
        note_unserved(state, request, request.status, now)
        request = request.next
    settle_chain(state, first)


cdef void refuse_late(SchedulerState *state, Request *first) noexcept nogil:
    cdef Request *request = first
    cdef int64_t now = now_ns()
    while request != NULL:
        fail_late(request, request.end_ns + request.retry_after_ns)
        count_failure(&state.counters, request, FAILURE_REJECTED, now)
        note_unserved(state, request, request.status, now)
        request = request.next
    settle_chain(state, first)


cdef void settle_taken_back(SchedulerState *state, const Request *request) noexcept nogil:
    cdef int64_t now = now_ns()
    count_failure(&state.counters, request, FAILURE_CANCELED, now)
    note_unserved(state, request, CANCELLED, now)
    if state.keeps_order:
        settle_in_order(state, NULL)
    leave(state, 1)
