"""Decides which requests run together, and when."""

from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from aiorch_server._core.curve cimport MAX_ROWS, read_curve, rows_within
from aiorch_server._core.fairness cimport make_room, make_time
from aiorch_server._core.forecast cimport MAX_FORETOLD, Forecast, foretell, remove_late
from aiorch_server._core.levels cimport MAX_SPAN_US
from aiorch_server._core.queue cimport (
    PATIENCE_NS,
    clear_queue,
    init_queue,
    most_urgent,
    precedes,
    push_request,
    remove_all,
    remove_expired,
    remove_request,
)
from aiorch_server._core.request cimport free_request, new_request


cdef int64_t preferred_rows(const BatchPolicy *policy, int64_t rows) noexcept nogil:
    """The largest preferred size that can be filled now; 0: none."""
    cdef int64_t best = 0
    for i in range(policy.n_preferred):
        if policy.preferred[i] <= rows:
            best = policy.preferred[i]
    return best


cdef int64_t due_at(const Bucket *bucket, const BatchPolicy *policy) noexcept nogil:
    """When the bucket must start at the latest, if nothing else arrives."""
    cdef int64_t due = bucket.oldest.enqueued_ns + policy.delay_ns
    cdef const Request *urgent = most_urgent(bucket)
    cdef int64_t end = urgent.deadline_ns
    if policy.is_deferring:
        end = urgent.end_ns
        if bucket.oldest.end_ns and (end == 0 or bucket.oldest.end_ns < end):
            end = bucket.oldest.end_ns      # of a lower level, it may run in the same batch
    if end == 0:
        return due
    return min(due, end - policy.margin_ns - expected_run(policy, max(urgent.rows, min(bucket.rows, policy.max_rows))))


cdef int64_t rows_in_time(const BatchPolicy *policy, const Request *urgent, int64_t limit, int64_t now_ns) noexcept nogil:
    """As much of `limit` as still keeps the end of the most urgent member; all of it where nothing does."""
    cdef int64_t rows
    if not policy.is_shedding or policy.curve.n == 0 or urgent.end_ns == 0:
        return limit
    rows = rows_within(&policy.curve, urgent.end_ns - now_ns, limit)
    return rows if rows >= urgent.rows else limit


cdef Bucket *find_starved(Queue *queue, int64_t now_ns) noexcept nogil:
    """Where the next batch is for who has waited for too long: their bucket; NULL: it is for the most urgent."""
    cdef Bucket *bucket = queue.buckets
    cdef Bucket *starved = NULL
    if queue.formed % STARVED_EVERY != 0:
        return NULL
    while bucket != NULL:
        if bucket.oldest.enqueued_ns + PATIENCE_NS <= now_ns and (
                starved == NULL or bucket.oldest.sequence < starved.oldest.sequence):
            starved = bucket
        bucket = bucket.next
    return starved


cdef void form_batch(Queue *queue, const BatchPolicy *policy, int64_t now_ns, FormedBatch *batch) noexcept nogil:
    cdef Bucket *bucket = queue.buckets
    cdef Bucket *chosen = NULL
    cdef Bucket *starved
    cdef int64_t due, limit = 0, bucket_limit
    cdef Request *request
    cdef Request *last = NULL
    batch.first = NULL
    batch.members = 0
    batch.rows = 0
    batch.wake_ns = 0
    while bucket != NULL:
        due = due_at(bucket, policy)
        bucket_limit = 0
        if bucket.rows >= policy.max_rows or due <= now_ns:
            bucket_limit = policy.max_rows
        elif policy.n_preferred:
            bucket_limit = preferred_rows(policy, bucket.rows)
        if bucket_limit:
            if chosen == NULL or precedes(most_urgent(bucket), most_urgent(chosen)):
                chosen = bucket
                limit = bucket_limit
        elif batch.wake_ns == 0 or due < batch.wake_ns:
            batch.wake_ns = due
        bucket = bucket.next
    if chosen == NULL:
        return
    batch.wake_ns = 0
    queue.formed += 1
    starved = find_starved(queue, now_ns)
    if starved != NULL:
        chosen, limit = starved, policy.max_rows
    else:
        limit = rows_in_time(policy, most_urgent(chosen), limit, now_ns)
    while True:
        request = chosen.oldest if starved != NULL else most_urgent(chosen)
        # the first member always goes: a preferred size may be smaller than one request
        if batch.members and batch.rows + request.rows > limit:
            return
        batch.members += 1
        batch.rows += request.rows
        if chosen.n == 1:
            remove_request(queue, request)  # retires the bucket
            chosen = NULL
        else:
            remove_request(queue, request)
        request.next = NULL
        if last == NULL:
            batch.first = request
        else:
            last.next = request
        last = request
        if chosen == NULL:
            return


cdef object change_policy(BatchPolicy *policy, int64_t largest_rows, max_rows, delay_ns, target_ns, margin_ns,
                          is_deferring, is_shedding, instances, curve):
    cdef BatchPolicy new = policy[0]
    if max_rows is not None:
        if not 1 <= max_rows <= largest_rows:
            raise ValueError(f"max_rows is {max_rows}; expected 1..{largest_rows}")
        new.max_rows = max_rows
    for name, span in (("delay", delay_ns), ("target", target_ns), ("margin", margin_ns)):
        if span is not None and not 0 <= span <= 1000 * MAX_SPAN_US:
            raise ValueError(f"the {name} is {span} ns; expected 0..{1000 * MAX_SPAN_US}")
    if instances is not None and not 0 <= instances <= MAX_INSTANCES:
        raise ValueError(f"instances is {instances}; expected 0..{<int> MAX_INSTANCES}")
    if curve is not None:
        read_curve(&new.curve, curve)
    new.delay_ns = new.delay_ns if delay_ns is None else delay_ns
    new.target_ns = new.target_ns if target_ns is None else target_ns
    new.margin_ns = new.margin_ns if margin_ns is None else margin_ns
    new.instances = new.instances if instances is None else instances
    new.is_deferring = new.is_deferring if is_deferring is None else bool(is_deferring)
    new.is_shedding = new.is_shedding if is_shedding is None else bool(is_shedding)
    policy[0] = new


cdef class BatchFormer:
    """A queue and its batching policy without lock, clock or tensors: for simulations and tests.

    Time is whatever the caller says it is, in nanoseconds; it must not run backwards. Requests are tickets. The policy's
    fields are those of ``Scheduler.set_policy``, in nanoseconds; ``run_ns`` is expected of a run where there is no curve.
    """

    def __cinit__(self, int64_t max_rows, *, int64_t delay_ns=0, preferred=(), int64_t run_ns=0, int n_key=1,
                  int64_t target_ns=0, int64_t margin_ns=0, bint is_deferring=False, bint is_shedding=False,
                  int instances=1, curve=()):
        sizes = sorted(preferred)
        if n_key < 1 or not 1 <= max_rows <= MAX_ROWS or run_ns < 0 or len(sizes) > MAX_PREFERRED:
            raise ValueError(f"max_rows is 1..{MAX_ROWS}, n_key at least 1, run_ns not negative, preferred sizes at most 16")
        init_queue(&self._queue, n_key)
        self._largest_rows = self._policy.max_rows = max_rows
        self._policy.run_ns = run_ns
        self._waiting = {}
        change_policy(&self._policy, max_rows, None, delay_ns, target_ns, margin_ns, is_deferring, is_shedding,
                      instances, curve)
        self._policy.n_preferred = len(sizes)
        for i, size in enumerate(sizes):
            self._policy.preferred[i] = size

    def __dealloc__(self):
        if self._waiting is not None:
            self.drop_chain(remove_all(&self._queue))
        clear_queue(&self._queue)

    def __len__(self):
        return self._queue.n

    def set_policy(self, *, max_rows=None, delay_ns=None, target_ns=None, margin_ns=None, is_deferring=None,
                   is_shedding=None, instances=None, curve=None):
        """Changes what is given of the policy; ``max_rows`` up to what it was made with. ValueError: nothing changed."""
        change_policy(&self._policy, self._largest_rows, max_rows, delay_ns, target_ns, margin_ns, is_deferring,
                      is_shedding, instances, curve)

    cdef Request *make_request(self, int64_t now_ns, rows, shape, level, deadline_ns, expires_ns,
                               received_ns) except NULL:
        cdef Request *request
        if len(shape) != self._queue.n_key:
            raise ValueError(f"shape keys have {self._queue.n_key} numbers here, got {len(shape)}")
        if not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"rows is {rows}; expected 1..{MAX_ROWS}")
        request = new_request(NULL, 0, 0, self._queue.n_key, NULL, NULL)
        if request == NULL:
            raise MemoryError
        try:
            for i, dim in enumerate(shape):
                request.shape_key[i] = dim
            request.rows, request.level = rows, level
            request.enqueued_ns, request.deadline_ns, request.expires_ns = now_ns, deadline_ns, expires_ns
            request.received_ns = now_ns if received_ns is None else received_ns
        except BaseException:
            free_request(request)
            raise
        request.end_ns = find_end(&self._policy, request)
        return request

    def push(self, int64_t now_ns, *, rows=1, shape=(0,), level=0, deadline_ns=0, expires_ns=0, received_ns=None):
        """Queues a request of that many rows and that shape key; gives its ticket."""
        cdef Request *request = self.make_request(now_ns, rows, shape, level, deadline_ns, expires_ns, received_ns)
        self._next_ticket += 1
        request.owner = <void *> <size_t> self._next_ticket
        if not push_request(&self._queue, request):
            free_request(request)
            raise MemoryError
        self._waiting[self._next_ticket] = <size_t> request
        return self._next_ticket

    def admit(self, int64_t now_ns, free_ns, *, uint64_t tenant=0, double weight=1.0, Py_ssize_t max_waiting=16384,
              rows=1, shape=(0,), level=0, deadline_ns=0, expires_ns=0, received_ns=None):
        """Queues a tenant's request as a scheduler's door does: ``(ticket, displaced tickets)``, ticket 0 if refused.

        Refused is what would be late, where the policy sheds, and what finds ``max_waiting`` others, unless somebody
        has to make way. ``free_ns``: when each instance is free.
        """
        cdef int64_t free[MAX_FORETOLD]
        cdef int64_t free_again[MAX_FORETOLD]
        cdef Forecast forecast
        cdef Request *request
        cdef Request *displaced = NULL
        cdef int n = len(free_ns)
        if not 1 <= n <= MAX_FORETOLD:
            raise ValueError(f"{n} instances; expected 1..{<int> MAX_FORETOLD}")
        for i in range(n):
            free[i] = free_again[i] = free_ns[i]
        request = self.make_request(now_ns, rows, shape, level, deadline_ns, expires_ns, received_ns)
        request.tenant, request.weight = tenant, weight
        if self._policy.is_shedding and self._policy.curve.n and request.end_ns:
            foretell(&self._queue, &self._policy, request, free, n, now_ns, &forecast)
            if forecast.late_ns and tenant:
                displaced = make_time(&self._queue, &self._policy, request, free_again, n, now_ns, &forecast)
            if forecast.late_ns:
                free_request(request)
                return 0, []
        if self._queue.n >= max_waiting and displaced == NULL:
            displaced = make_room(&self._queue, &self._policy, request, False, 0) if tenant else NULL
            if displaced == NULL:
                free_request(request)
                return 0, []
        self._next_ticket += 1
        request.owner = <void *> <size_t> self._next_ticket
        if not push_request(&self._queue, request):
            free_request(request)
            raise MemoryError
        self._waiting[self._next_ticket] = <size_t> request
        return self._next_ticket, self.drop_chain(displaced)

    def foretell(self, int64_t now_ns, free_ns, *, rows=1, shape=(0,), level=0, deadline_ns=0, received_ns=None):
        """``(finish_ns, late_ns)`` of a request that would be pushed now; ``free_ns``: when each instance is free."""
        cdef int64_t free[MAX_FORETOLD]
        cdef Forecast forecast
        cdef Request *request
        cdef int n = len(free_ns)
        if not 1 <= n <= MAX_FORETOLD:
            raise ValueError(f"{n} instances; expected 1..{<int> MAX_FORETOLD}")
        for i in range(n):
            free[i] = free_ns[i]
        request = self.make_request(now_ns, rows, shape, level, deadline_ns, 0, received_ns)
        foretell(&self._queue, &self._policy, request, free, n, now_ns, &forecast)
        free_request(request)
        return forecast.finish_ns, forecast.late_ns

    def cancel(self, Py_ssize_t ticket):
        """Takes a queued request out; KeyError if it does not wait."""
        cdef Request *request = <Request *> <size_t> self._waiting.pop(ticket)
        remove_request(&self._queue, request)
        free_request(request)

    def expire(self, int64_t now_ns):
        """Takes out what is past its deadline; gives the tickets."""
        return self.drop_chain(remove_expired(&self._queue, now_ns))

    def drop_late(self, int64_t now_ns):
        """Takes out what a free instance would have to serve next and cannot in time; gives the tickets."""
        return self.drop_chain(remove_late(&self._queue, &self._policy, now_ns))

    def form(self, int64_t now_ns):
        """``(tickets, rows, wake_ns)``: the batch that is due, in order, or none and when to look again (0: never)."""
        cdef FormedBatch batch
        form_batch(&self._queue, &self._policy, now_ns, &batch)
        rows, wake_ns = batch.rows, batch.wake_ns
        return self.drop_chain(batch.first), rows, wake_ns

    cdef list drop_chain(self, Request *chain):
        cdef Request *following
        tickets = []
        while chain != NULL:
            following = chain.next
            ticket = <size_t> chain.owner
            self._waiting.pop(ticket, None)
            tickets.append(ticket)
            free_request(chain)
            chain = following
        return tickets
