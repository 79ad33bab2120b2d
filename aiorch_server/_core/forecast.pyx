"""Predicted finishes, and who is too late already; see forecast.pxd."""

from aiorch_server._core.batch_former cimport expected_run
from aiorch_server._core.curve cimport rows_within, run_time
from aiorch_server._core.queue cimport (
    Bucket,
    bucket_of,
    most_urgent,
    overtakes,
    remove_request,
    rows_before,
    urgency_of,
)
from aiorch_server._core.tenants cimport Line, find_rival, find_victim

cdef enum:
    LEAST_RUN_NS = 1


cdef void sort(int64_t *values, int n) noexcept nogil:
    cdef int64_t value
    cdef int at
    for i in range(1, n):
        value = values[i]
        at = i
        while at > 0 and values[at - 1] > value:
            values[at] = values[at - 1]
            at -= 1
        values[at] = value


cdef int64_t finish_of(const BatchPolicy *policy, int64_t *free_ns, int n, int64_t batches, int64_t rows,
                       int64_t now_ns) noexcept nogil:
    cdef int64_t run_ns = max(<int64_t> LEAST_RUN_NS, run_time(&policy.curve, policy.max_rows))
    cdef int64_t level, rounds
    cdef int i, first
    for i in range(n):
        free_ns[i] = max(free_ns[i], now_ns)
    sort(free_ns, n)
    while True:         # how many batches start before the last instance is free; without it if they are all
        level = 0
        for i in range(n - 1):
            level += (free_ns[n - 1] - free_ns[i]) // run_ns
        if batches >= level:
            break
        n -= 1
    for i in range(n - 1):
        free_ns[i] += (free_ns[n - 1] - free_ns[i]) // run_ns * run_ns
    batches -= level
    rounds = batches // n
    batches -= rounds * n
    while True:
        first = 0
        for i in range(1, n):
            if free_ns[i] < free_ns[first]:
                first = i
        if batches == 0:
            return free_ns[first] + rounds * run_ns + run_time(&policy.curve, rows)
        free_ns[first] += run_ns
        batches -= 1


cdef inline int64_t batches_for(int64_t rows, int64_t cap) noexcept nogil:
    return (rows + cap - 1) // cap


cdef int64_t batches_before(const Queue *queue, const BatchPolicy *policy, const Request *request, bint is_exact,
                            int64_t *last_rows) noexcept nogil:
    """How many batches run before the request's own, and the rows of that one so far.

    Not exact: as if nobody could be overtaken. That costs less, and who makes it even so makes it.
    """
    cdef const Bucket *own = bucket_of(queue, request.shape_key)
    cdef const Bucket *bucket = queue.buckets
    cdef int64_t urgency_ns = urgency_of(request)
    cdef int64_t rows, batches = 0, cap = policy.max_rows
    last_rows[0] = request.rows
    while bucket != NULL:
        rows = rows_before(bucket, request.level, urgency_ns) if is_exact else bucket.rows
        if bucket != own:
            batches += batches_for(rows, cap)
        elif rows % cap + request.rows <= cap:
            batches += rows // cap
            last_rows[0] += rows % cap
        else:
            batches += batches_for(rows, cap)
        bucket = bucket.next
    return batches


cdef bint overtakes_any(const Queue *queue, const Request *request) noexcept nogil:
    cdef const Bucket *bucket = queue.buckets
    while bucket != NULL:
        if overtakes(bucket, request.level, urgency_of(request)):
            return True
        bucket = bucket.next
    return False


cdef void foretell(const Queue *queue, const BatchPolicy *policy, const Request *request, int64_t *free_ns, int n,
                   int64_t now_ns, Forecast *forecast) noexcept nogil:
    cdef int64_t free_again[MAX_FORETOLD]
    cdef int64_t rows, batches
    cdef bint is_anybody_free = False
    forecast.finish_ns = forecast.late_ns = 0
    if policy.curve.n == 0:
        return
    for i in range(n):
        free_again[i] = free_ns[i]
        is_anybody_free |= free_ns[i] <= now_ns
    batches = batches_before(queue, policy, request, False, &rows)
    forecast.finish_ns = finish_of(policy, free_ns, n, batches, rows, now_ns)
    if request.end_ns == 0 or forecast.finish_ns + policy.margin_ns <= request.end_ns:
        return
    if overtakes_any(queue, request):
        batches = batches_before(queue, policy, request, True, &rows)
        forecast.finish_ns = finish_of(policy, free_again, n, batches, rows, now_ns)
    if batches > 0 or rows > request.rows or not is_anybody_free:
        forecast.late_ns = max(0, forecast.finish_ns + policy.margin_ns - request.end_ns)


cdef int64_t find_pause(const Queue *queue, const BatchPolicy *policy) noexcept nogil:
    cdef const Bucket *bucket = queue.buckets
    cdef double pause_ns = <double> expected_run(policy, policy.max_rows)
    cdef int64_t batches = 0
    if pause_ns <= 0:
        return USUAL_PAUSE_NS
    while bucket != NULL:
        batches += batches_for(bucket.rows, policy.max_rows)
        bucket = bucket.next
    pause_ns *= <double> batches / (2 * max(1, policy.instances))
    return <int64_t> min(max(pause_ns, <double> MIN_PAUSE_NS), <double> MAX_PAUSE_NS)


cdef int64_t make_last_late(const Bucket *bucket, const BatchPolicy *policy, int64_t rows, int64_t now_ns) noexcept nogil:
    """By how much who came last is late if a batch of `rows`, smaller than the load needs, runs first; 0: it makes it."""
    cdef int64_t cap = policy.max_rows
    cdef int64_t rounds = batches_for(batches_for(bucket.rows - rows, cap), max(1, policy.instances))
    cdef int64_t first_ns = run_time(&policy.curve, rows)
    cdef int64_t next_ns = run_time(&policy.curve, min(cap, bucket.rows - rows))
    cdef int64_t head_end_ns = most_urgent(bucket).end_ns
    cdef int64_t late_ns
    # who is less urgent has no say: the head was let in because it overtakes
    if bucket.newest.end_ns == 0 or bucket.newest.level > most_urgent(bucket).level:
        return 0
    late_ns = now_ns + first_ns + rounds * next_ns - bucket.newest.end_ns
    # if the next head stood where this one does, one small batch would follow the other; its end is guessed between both
    if rows < bucket.rows and bucket.newest.end_ns > head_end_ns:
        head_end_ns += <int64_t> (<double> (bucket.newest.end_ns - head_end_ns) * rows / bucket.rows)
        late_ns = max(late_ns, now_ns + first_ns + next_ns - head_end_ns)
    return max(0, late_ns)


cdef Request *find_heavier(const Queue *queue, const Request *head) noexcept nogil:
    """Who may be dropped in place of the head, of a tenant that holds more; NULL: nobody."""
    cdef const Line *rival
    cdef Request *victim
    if head.tenant == 0 or queue.tenants == NULL:
        return NULL
    rival = find_rival(queue.tenants, head, True)
    if rival == NULL:
        return NULL
    victim = find_victim(rival.newest, head.level, True)
    return victim if victim.bucket == head.bucket else NULL


cdef Request *remove_late(Queue *queue, const BatchPolicy *policy, int64_t now_ns) noexcept nogil:
    cdef Request *chain = NULL
    cdef Request *head
    cdef Bucket *bucket = queue.buckets
    cdef Bucket *following
    cdef Request *heavier
    cdef int64_t left_ns, last_late_ns, rows
    if not policy.is_shedding or policy.curve.n == 0:
        return NULL
    while bucket != NULL:
        following = bucket.next             # the last member takes its bucket with it
        while queue.n > 1:
            head = most_urgent(bucket)
            left_ns = head.end_ns - now_ns
            if head.end_ns == 0 or run_time(&policy.curve, min(policy.max_rows, bucket.rows)) <= left_ns:
                break
            rows = rows_within(&policy.curve, left_ns, min(policy.max_rows, bucket.rows))
            last_late_ns = make_last_late(bucket, policy, rows, now_ns) if rows >= head.rows else 0
            if rows >= head.rows and last_late_ns == 0:
                break
            heavier = NULL
            if rows >= head.rows and 2 * rows >= min(policy.max_rows, bucket.rows):
                heavier = find_heavier(queue, head)     # a batch that is half full costs little, a lighter tenant a lot
            if heavier != NULL:
                head = heavier
                head.retry_after_ns = last_late_ns
            else:
                head.retry_after_ns = run_time(&policy.curve, min(policy.max_rows, bucket.rows)) - left_ns
            rows = bucket.n
            remove_request(queue, head)
            head.next = chain
            chain = head
            if rows == 1:
                break
        bucket = following
    return chain
