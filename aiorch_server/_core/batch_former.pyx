"""Decides which requests run together, and when."""

from libc.stddef cimport size_t

from aiorch_server._core.queue cimport (
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
    if urgent.deadline_ns and urgent.deadline_ns - policy.run_ns < due:
        due = urgent.deadline_ns - policy.run_ns
    return due


cdef void form_batch(Queue *queue, const BatchPolicy *policy, int64_t now_ns, FormedBatch *batch) noexcept nogil:
    cdef Bucket *bucket = queue.buckets
    cdef Bucket *chosen = NULL
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
    while True:
        request = most_urgent(chosen)
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


cdef class BatchFormer:
    """A queue and its batching policy without lock, clock or tensors: for simulations and tests.

    Time is whatever the caller says it is, in nanoseconds; it must not run backwards. Requests are tickets.
    """

    def __cinit__(self, int64_t max_rows, *, int64_t delay_ns=0, preferred=(), int64_t run_ns=0, int n_key=1):
        sizes = sorted(preferred)
        if max_rows < 1 or delay_ns < 0 or n_key < 1 or len(sizes) > MAX_PREFERRED:
            raise ValueError("max_rows and n_key are at least 1, delays not negative, preferred sizes at most 16")
        init_queue(&self._queue, n_key)
        self._policy.max_rows = max_rows
        self._policy.delay_ns = delay_ns
        self._policy.run_ns = run_ns
        self._policy.n_preferred = len(sizes)
        for i, size in enumerate(sizes):
            self._policy.preferred[i] = size
        self._waiting = {}

    def __dealloc__(self):
        if self._waiting is not None:
            self.drop_chain(remove_all(&self._queue))
        clear_queue(&self._queue)

    def __len__(self):
        return self._queue.n

    def push(self, int64_t now_ns, *, int64_t rows=1, shape=(0,), int level=0, int64_t deadline_ns=0,
             int64_t expires_ns=0):
        """Queues a request of that many rows and that shape key; gives its ticket."""
        cdef Request *request
        if len(shape) != self._queue.n_key:
            raise ValueError(f"shape keys have {self._queue.n_key} numbers here, got {len(shape)}")
        self._next_ticket += 1
        request = new_request(NULL, 0, 0, self._queue.n_key, NULL, <void *> <size_t> self._next_ticket)
        if request == NULL:
            raise MemoryError
        for i, dim in enumerate(shape):
            request.shape_key[i] = dim
        request.rows = rows
        request.level = level
        request.enqueued_ns = now_ns
        request.deadline_ns = deadline_ns
        request.expires_ns = expires_ns
        if not push_request(&self._queue, request):
            free_request(request)
            raise MemoryError
        self._waiting[self._next_ticket] = <size_t> request
        return self._next_ticket

    def cancel(self, Py_ssize_t ticket):
        """Takes a queued request out; KeyError if it does not wait."""
        cdef Request *request = <Request *> <size_t> self._waiting.pop(ticket)
        remove_request(&self._queue, request)
        free_request(request)

    def expire(self, int64_t now_ns):
        """Takes out what is past its deadline; gives the tickets."""
        return self.drop_chain(remove_expired(&self._queue, now_ns))

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
