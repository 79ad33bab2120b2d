"""Making way for tenants that hold less; see fairness.pxd."""

from libc.string cimport memcpy

from aiorch_server._core.curve cimport run_time
from aiorch_server._core.forecast cimport MAX_FORETOLD, find_pause, foretell
from aiorch_server._core.queue cimport Bucket, remove_request
from aiorch_server._core.tenants cimport Line, find_rival, find_victim, holding_with


cdef Request *make_time(Queue *queue, const BatchPolicy *policy, Request *request, const int64_t *free_ns, int n,
                        int64_t now_ns, Forecast *forecast) noexcept nogil:
    cdef Request *victims[MAX_DISPLACED]
    cdef int64_t rows[MAX_DISPLACED]
    cdef int64_t free_again[MAX_FORETOLD]
    cdef const Line *rival
    cdef Request *victim
    cdef Request *chain = NULL
    cdef Forecast found
    cdef double own
    cdef int64_t left, pause_ns
    cdef int i, count = 0
    if queue.tenants == NULL or now_ns + run_time(&policy.curve, request.rows) + policy.margin_ns > request.end_ns:
        return NULL
    rival = find_rival(queue.tenants, request, True)
    if rival == NULL:
        return NULL
    own, left = holding_with(queue.tenants, request), rival.rows
    found.late_ns = 1
    victim = find_victim(rival.newest, request.level, True)
    while victim != NULL and count < MAX_DISPLACED and count < rival.n - 1 and <double> left > own * rival.weight:
        # as if it were gone: the order does not look at rows
        victims[count], rows[count] = victim, victim.rows
        count += 1
        left -= victim.rows
        (<Bucket *> victim.bucket).rows -= victim.rows
        victim.rows = 0
        memcpy(free_again, free_ns, <size_t> n * sizeof(int64_t))
        foretell(queue, policy, request, free_again, n, now_ns, &found)
        if found.late_ns == 0:
            break
        victim = find_victim(victim.line_older, request.level, True)
    for i in range(count):
        victims[i].rows = rows[i]
        (<Bucket *> victims[i].bucket).rows += rows[i]
    if found.late_ns:
        return NULL
    forecast[0] = found
    pause_ns = find_pause(queue, policy)
    for i in range(count):
        remove_request(queue, victims[i])
        victims[i].retry_after_ns = pause_ns
        victims[i].next = chain
        chain = victims[i]
    return chain


cdef Request *make_room(Queue *queue, const BatchPolicy *policy, const Request *request, bint is_same_level,
                        int64_t n_bytes) noexcept nogil:
    cdef const Line *rival
    cdef Request *victim
    if queue.tenants == NULL:
        return NULL
    rival = find_rival(queue.tenants, request, is_same_level)
    if rival == NULL:
        return NULL
    victim = find_victim(rival.newest, request.level, is_same_level)
    if <int64_t> victim.message_size < n_bytes:
        return NULL
    victim.retry_after_ns = find_pause(queue, policy)
    remove_request(queue, victim)
    victim.next = NULL
    return victim
