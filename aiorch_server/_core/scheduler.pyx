"""The scheduler of one model version: enqueue, cancel, take, settle; all of it callable without the interpreter."""

from libc.stdlib cimport calloc, free
from libc.string cimport memset

from aiorch_server._core.batch_former cimport MAX_PREFERRED, FormedBatch, form_batch
from aiorch_server._core.buffers cimport drop_buffer
from aiorch_server._core.counters cimport (
    FAILURE_CANCELED,
    FAILURE_REJECTED,
    count_failure,
    describe_counters,
    drop_counters,
    init_counters,
)
from aiorch_server._core.queue cimport clear_queue, init_queue, push_request, remove_all, remove_expired, remove_request
from aiorch_server._core.request cimport (
    REQUEST_NEW,
    REQUEST_QUEUED,
    REQUEST_RUNNING,
    Stamps,
    aiorch_add_reference,
    mark_cancelled,
    now_ns,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    put_settled,
    refuse_request,
)
from aiorch_server._core.slabs cimport empty_slab, note_batch, relax_slab, reserve_rows
from aiorch_server._core.spec cimport release_spec, retain_spec
from aiorch_server._core.watch cimport (
    drop_watch,
    init_watch,
    note_slow,
    set_sampling,
    take_notes,
    take_sample,
    watch_slow,
)

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    ctypedef int clockid_t
    clockid_t CLOCK_MONOTONIC

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_condattr_t:
        pass
    int pthread_condattr_init(pthread_condattr_t *)
    int pthread_condattr_setclock(pthread_condattr_t *, clockid_t)
    int pthread_condattr_destroy(pthread_condattr_t *)
    int pthread_cond_init(pthread_cond_t *, pthread_condattr_t *)
    int pthread_cond_destroy(pthread_cond_t *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_broadcast(pthread_cond_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_timedwait(pthread_cond_t *, pthread_mutex_t *, const timespec *)

cdef int CANCELLED = 1
cdef int INVALID_ARGUMENT = 3
cdef int DEADLINE_EXCEEDED = 4
cdef int UNAVAILABLE = 14

# The longest delay or timeout, 146 years: added to the clock it still is a number of 63 bits.
cdef int64_t MAX_SPAN_US = (1 << 62) // 1000
cdef double MAX_WAIT_S = 1e9
# An idle instance looks into its queue so often by itself: glibc can lose a wake-up (its bug 25847).
cdef int64_t MAX_NAP_NS = 1000000000

# Requests and bytes that one queue holds when the configuration names no bound.
DEFAULT_MAX_REQUESTS = 16384
DEFAULT_MAX_BYTES = 1 << 30



cdef void wait_until(pthread_cond_t *cond, pthread_mutex_t *lock, int64_t at_ns) noexcept nogil:
    cdef timespec at
    if at_ns == 0:
        pthread_cond_wait(cond, lock)
        return
    at.tv_sec = at_ns // 1000000000
    at.tv_nsec = at_ns % 1000000000
    pthread_cond_timedwait(cond, lock, &at)


cdef void retain_scheduler(SchedulerState *state) noexcept nogil:
    aiorch_add_reference(&state.references, 1)


cdef void release_scheduler(SchedulerState *state) noexcept nogil:
    if aiorch_add_reference(&state.references, -1) > 0:
        return
    clear_queue(&state.queue)
    drop_buffer(empty_slab(&state.slab))
    pthread_cond_destroy(&state.due)
    pthread_cond_destroy(&state.idle)
    pthread_mutex_destroy(&state.lock)
    drop_watch(&state.watch)
    release_spec(state.spec)
    free(state.levels)
    drop_counters(&state.counters)
    free(state)


cdef void drop_scheduler(void *state) noexcept nogil:
    release_scheduler(<SchedulerState *> state)


cdef inline void count_out(SchedulerState *state, const Request *request) noexcept nogil:
    """A request is not queued any more; under the lock."""
    if state.has_bounded_levels:
        state.levels[request.level >> 1].n -= 1


cdef void note_arrival(SchedulerState *state, Request *request) noexcept nogil:
    request.later = NULL
    request.sooner = state.last_arrived
    if state.last_arrived != NULL:
        state.last_arrived.later = request
    else:
        state.first_arrived = request
    state.last_arrived = request


cdef void forget_arrival(SchedulerState *state, Request *request) noexcept nogil:
    if request.sooner != NULL:
        request.sooner.later = request.later
    else:
        state.first_arrived = request.later
    if request.later != NULL:
        request.later.sooner = request.sooner
    else:
        state.last_arrived = request.sooner
    request.sooner = request.later = NULL


cdef EnqueueResult enqueue(SchedulerState *state, Request *request, uint64_t priority, int64_t timeout_us,
                           int64_t now) noexcept nogil:
    cdef EnqueueResult result = ENQUEUED
    cdef LevelPolicy *policy
    cdef int64_t expires_ns
    if state.n_levels:
        if priority > state.n_levels:
            return REFUSED_LEVEL
        request.level = <unsigned int> (priority or state.default_level) << 1
    policy = &state.levels[request.level >> 1]
    request.expires_ns = now + policy.expiry_ns if policy.expiry_ns else 0
    # Triton: a request may shorten the policy's time, never lengthen it
    if timeout_us and policy.allows_override:
        expires_ns = now + min(timeout_us, MAX_SPAN_US) * 1000
        if request.expires_ns == 0 or expires_ns < request.expires_ns:
            request.expires_ns = expires_ns
    request.enqueued_ns = now
    if request.received_ns == 0:
        request.received_ns = now
    pthread_mutex_lock(&state.lock)
    if state.is_closed:
        result = REFUSED_CLOSED
    elif (state.queue.n >= state.max_requests
          or policy.max_requests and policy.n >= policy.max_requests
          or state.queue.n_bytes + <int64_t> request.message_size > state.max_bytes and state.queue.n > 0
          or not push_request(&state.queue, request)):
        result = REFUSED_FULL
    else:
        request.state = REQUEST_QUEUED
        request.scheduler = state
        request.drop_scheduler = drop_scheduler
        retain_scheduler(state)
        state.in_flight += 1
        if state.has_bounded_levels:
            policy.n += 1
        if state.keeps_order:
            note_arrival(state, request)
    pthread_mutex_unlock(&state.lock)
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


cdef void wake(SchedulerState *state) noexcept nogil:
    cdef bint is_awaited
    pthread_mutex_lock(&state.lock)
    is_awaited = state.waiting > 0
    pthread_mutex_unlock(&state.lock)
    if is_awaited:
        pthread_cond_signal(&state.due)


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


cdef bint cancel_request(Request *request) noexcept nogil:
    cdef SchedulerState *state = <SchedulerState *> request.scheduler
    cdef bint was_queued = False
    cdef int64_t now
    if state == NULL:       # refused at once: it is in its sink
        return False
    pthread_mutex_lock(&state.lock)
    if request.state == REQUEST_QUEUED:
        remove_request(&state.queue, request)
        count_out(state, request)
        if state.keeps_order:
            forget_arrival(state, request)
        request.state = REQUEST_NEW
        was_queued = True
    else:
        mark_cancelled(request)
    pthread_mutex_unlock(&state.lock)
    if was_queued:
        now = now_ns()
        count_failure(&state.counters, request, FAILURE_CANCELED, now)
        note_unserved(state, request, CANCELLED, now)
        if state.keeps_order:   # others may have waited for its answer
            settle_in_order(state, NULL)
        leave(state, 1)
    return was_queued


cdef void note_unserved(SchedulerState *state, const Request *request, int status, int64_t now) noexcept nogil:
    """Notes a request that left the queue without having run, if it took long."""
    cdef Stamps stamps
    if now - request.received_ns < state.watch.slow_ns:
        return
    memset(&stamps, 0, sizeof(stamps))
    stamps.received_ns, stamps.enqueued_ns, stamps.settled_ns = request.received_ns, request.enqueued_ns, now
    note_slow(&state.watch, request, &stamps, status)


cdef void settle_chain(SchedulerState *state, Request *first) noexcept nogil:
    retain_scheduler(state)     # the owners may free all requests, and with them the last reference, meanwhile
    if state.keeps_order:
        settle_in_order(state, first)
    else:
        leave(state, hand_over(first))
    release_scheduler(state)


cdef void settle_in_order(SchedulerState *state, Request *settled) noexcept nogil:
    """Hands over what is settled and before which nothing is open; the rest waits. The caller holds a reference.

    One thread at a time hands over, for all: no lock is held meanwhile, because a sink that nobody drains frees requests
    at once, and that may need the interpreter lock, which another caller may hold.
    """
    cdef Request *first
    cdef Request *last
    cdef Request *request
    cdef int64_t n = 0
    pthread_mutex_lock(&state.lock)
    while settled != NULL:
        settled.is_settled = True
        settled = settled.next
    if not state.is_handing_over:
        state.is_handing_over = True
        while state.first_arrived != NULL and state.first_arrived.is_settled:
            first = last = NULL
            while state.first_arrived != NULL and state.first_arrived.is_settled:
                request = state.first_arrived
                forget_arrival(state, request)
                request.next = NULL
                if last == NULL:
                    first = request
                else:
                    last.next = request
                last = request
            pthread_mutex_unlock(&state.lock)
            n += hand_over(first)
            pthread_mutex_lock(&state.lock)
        state.is_handing_over = False
    pthread_mutex_unlock(&state.lock)
    if n:
        leave(state, n)


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


cdef void refuse_chain(SchedulerState *state, Request *first, int status, const char *text) noexcept nogil:
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
        count_failure(&state.counters, request, FAILURE_REJECTED, now)
        note_unserved(state, request, request.status, now)
        request = request.next
    settle_chain(state, first)


cdef Request *delay_expired(SchedulerState *state, Request *expired, int64_t now) noexcept nogil:
    """Queues again, behind the others, what its level delays; gives the rest. Under the lock."""
    cdef Request *refused = NULL
    cdef Request *following
    while expired != NULL:
        following = expired.next
        expired.next = NULL
        if state.levels[expired.level >> 1].delays and not (expired.deadline_ns and expired.deadline_ns <= now):
            expired.expires_ns = 0
            expired.level |= 1
            if push_request(&state.queue, expired):
                expired = following
                continue
        expired.next = refused
        refused = expired
        expired = following
    return refused


cdef Request *take_batch(SchedulerState *state, int *members, int64_t *rows, int64_t *free_since) noexcept nogil:
    cdef FormedBatch batch
    cdef Request *request
    cdef Request *expired
    cdef int64_t now = now_ns()
    cdef int64_t wake_ns
    cdef bint another_is_due
    free_since[0] = now
    pthread_mutex_lock(&state.lock)
    while True:
        expired = remove_expired(&state.queue, now)
        if expired != NULL and state.has_delays:
            expired = delay_expired(state, expired, now)
        if expired != NULL:
            request = expired
            while request != NULL:
                count_out(state, request)
                request.state = REQUEST_RUNNING     # no longer cancellable out of the queue
                request = request.next
            pthread_mutex_unlock(&state.lock)
            refuse_chain(state, expired, 0, NULL)
            now = now_ns()
            pthread_mutex_lock(&state.lock)
            continue
        form_batch(&state.queue, &state.policy, now, &batch)
        if batch.first != NULL:
            break
        if state.is_closed and state.queue.n == 0:
            pthread_mutex_unlock(&state.lock)
            return NULL
        wake_ns = batch.wake_ns
        if state.queue.next_expiry_ns and (wake_ns == 0 or state.queue.next_expiry_ns < wake_ns):
            wake_ns = state.queue.next_expiry_ns
        if wake_ns == 0 or wake_ns > now + MAX_NAP_NS:
            wake_ns = now + MAX_NAP_NS
        state.waiting += 1
        wait_until(&state.due, &state.lock, wake_ns)
        state.waiting -= 1
        now = now_ns()
    request = batch.first
    while request != NULL:
        count_out(state, request)
        request.state = REQUEST_RUNNING
        request.taken_ns = now
        request = request.next
    note_batch(&state.slab, batch.rows)
    # the baton: whoever got a batch wakes the next instance if there is more to do
    another_is_due = state.waiting > 0 and state.queue.n > 0
    pthread_mutex_unlock(&state.lock)
    if another_is_due:
        pthread_cond_signal(&state.due)
    members[0] = batch.members
    rows[0] = batch.rows
    return batch.first


cdef class Scheduler:
    """Queue and batching policy of one model version; see docs/architecture.md for the Python contract.

    ``max_queue_size`` 0 means the default bound of 16,384 requests; messages in the queue are bounded by
    ``max_queue_bytes`` besides. ``priority_levels`` 0 means that priorities are not used. ``level_policies`` has for each
    level, from 1 on: the requests that may wait there (0: no bound of its own), the time they may (0: any), whether they
    may bring a shorter one, and whether they are served last, instead of refused, when it is over (``delay_expired``).
    With ``preserve_ordering`` answers, of whatever kind, leave in the order in which the requests came.
    """

    def __cinit__(self, ModelSpec spec not None, *, int64_t max_queue_delay_us=0, preferred_batch_sizes=(),
                  int64_t max_queue_size=0, int64_t max_queue_bytes=0, uint64_t priority_levels=0,
                  uint64_t default_priority_level=0, int64_t default_timeout_us=0, bint allow_timeout_override=False,
                  bint delay_expired=False, level_policies=(), bint preserve_ordering=False):
        cdef SchedulerState *state
        cdef pthread_condattr_t attributes
        own_policy = (0, default_timeout_us, allow_timeout_override, delay_expired)
        policies = [own_policy, *(level_policies or [own_policy] * (priority_levels if priority_levels <= MAX_LEVELS else 0))]
        sizes = sorted(set(preferred_batch_sizes))
        if len(sizes) > MAX_PREFERRED:
            raise ValueError(f"{len(sizes)} preferred batch sizes; at most {MAX_PREFERRED} work")
        if sizes and not 1 <= min(sizes) <= max(sizes) <= max(1, spec.state.max_batch_size):
            raise ValueError(f"preferred batch sizes {sizes} must lie within 1..{max(1, spec.state.max_batch_size)}")
        if min(max_queue_delay_us, max_queue_size, max_queue_bytes, default_timeout_us) < 0:
            raise ValueError("delays, sizes and timeouts must not be negative")
        if max(max_queue_delay_us, default_timeout_us) > MAX_SPAN_US:
            raise ValueError(f"delays and timeouts are at most {MAX_SPAN_US} microseconds")
        if priority_levels > MAX_LEVELS or default_priority_level > priority_levels:
            raise ValueError(f"default priority level {default_priority_level} of {priority_levels} levels")
        if priority_levels and not default_priority_level:
            raise ValueError("priority levels need a default level of at least 1")
        if len(policies) != priority_levels + 1:
            raise ValueError(f"{len(policies) - 1} policies for {priority_levels} levels")
        for size, timeout_us, _, _ in policies:
            if size < 0 or not 0 <= timeout_us <= MAX_SPAN_US:
                raise ValueError(f"a level's size {size} and timeout {timeout_us} must be 0 or more, and no overflow")
        if preserve_ordering and (priority_levels > 1 or any(delays for _, _, _, delays in policies)):
            raise ValueError("answers cannot leave in the order of arrival where requests overtake each other")
        self.spec = spec
        state = <SchedulerState *> calloc(1, sizeof(SchedulerState))
        if state == NULL:
            raise MemoryError
        if not init_counters(&state.counters, spec.state.max_batch_size):
            free(state)
            raise MemoryError
        state.levels = <LevelPolicy *> calloc(len(policies), sizeof(LevelPolicy))
        if state.levels == NULL:
            drop_counters(&state.counters)
            free(state)
            raise MemoryError
        for i, (size, timeout_us, allows_override, delays) in enumerate(policies):
            state.levels[i].max_requests = size
            state.levels[i].expiry_ns = timeout_us * 1000
            state.levels[i].allows_override = allows_override
            state.levels[i].delays = delays
            state.has_bounded_levels |= size > 0
            state.has_delays |= bool(delays)
        state.keeps_order = preserve_ordering
        pthread_mutex_init(&state.lock, NULL)
        init_watch(&state.watch)
        pthread_condattr_init(&attributes)
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
        pthread_cond_init(&state.due, &attributes)
        pthread_cond_init(&state.idle, &attributes)
        pthread_condattr_destroy(&attributes)
        init_queue(&state.queue, spec.state.n_key)
        state.references = 1
        state.policy.max_rows = max(1, spec.state.max_batch_size)
        state.policy.delay_ns = max_queue_delay_us * 1000
        state.policy.n_preferred = len(sizes)
        for i, size in enumerate(sizes):
            state.policy.preferred[i] = size
        state.max_requests = max_queue_size or <int64_t> DEFAULT_MAX_REQUESTS
        state.max_bytes = max_queue_bytes or <int64_t> DEFAULT_MAX_BYTES
        state.n_levels = priority_levels
        state.default_level = default_priority_level
        state.spec = spec.state
        retain_spec(state.spec)
        self.state = state

    def __dealloc__(self):
        if self.state != NULL:
            self.abandon(UNAVAILABLE, "Server is stopping, scheduler for model has stopped accepting new inference requests")
            release_scheduler(self.state)

    @property
    def pending(self):
        """Requests that wait in the queue now."""
        cdef Py_ssize_t n
        pthread_mutex_lock(&self.state.lock)
        n = self.state.queue.n
        pthread_mutex_unlock(&self.state.lock)
        return n

    @property
    def in_flight(self):
        """Requests that wait or run now: the leases on this version."""
        cdef int64_t n
        pthread_mutex_lock(&self.state.lock)
        n = self.state.in_flight
        pthread_mutex_unlock(&self.state.lock)
        return n

    @property
    def is_closed(self):
        """True once ``close`` or ``abandon`` was called."""
        return bool(self.state.is_closed)

    def take(self, batch not None):
        """Fills ``batch`` with the next due requests; blocks without the interpreter lock.

        False once the scheduler is closed and its queue is empty. Members of the previous batch that were not settled
        are failed first. Called by an instance's own thread.
        """
        return batch._fill(self)

    def close(self):
        """Takes no new requests; instances serve what is queued, at once, then ``take`` gives False."""
        cdef uint8_t *dropped
        pthread_mutex_lock(&self.state.lock)
        self.state.is_closed = True
        self.state.policy.delay_ns = 0      # nobody can come any more for whom it would be worth waiting
        dropped = empty_slab(&self.state.slab)
        pthread_cond_broadcast(&self.state.due)
        pthread_mutex_unlock(&self.state.lock)
        drop_buffer(dropped)

    def abandon(self, int code, str text not None):
        """Closes, and fails everything that is still queued with that gRPC code and text."""
        cdef Request *chain
        cdef Request *request
        cdef bytes message = text.encode("utf-8", "replace")
        cdef const char *words = message
        self.close()
        with nogil:
            pthread_mutex_lock(&self.state.lock)
            chain = remove_all(&self.state.queue)
            request = chain
            while request != NULL:
                count_out(self.state, request)
                request.state = REQUEST_RUNNING
                request = request.next
            pthread_mutex_unlock(&self.state.lock)
            refuse_chain(self.state, chain, code, words)

    def wait_idle(self, double timeout_s):
        """Blocks, without the interpreter lock, until nothing is queued or running; False when the time is over first."""
        cdef int64_t until = now_ns() + <int64_t> (min(max(0.0, timeout_s), MAX_WAIT_S) * 1e9)
        cdef bint is_idle
        with nogil:
            pthread_mutex_lock(&self.state.lock)
            while self.state.in_flight > 0 and now_ns() < until:
                wait_until(&self.state.idle, &self.state.lock, until)
            is_idle = self.state.in_flight == 0
            pthread_mutex_unlock(&self.state.lock)
        return is_idle

    def watch_slow(self, int64_t threshold_us):
        """From now on requests that took ``threshold_us`` or longer are noted; 0: none."""
        watch_slow(&self.state.watch, min(threshold_us, MAX_SPAN_US) * 1000)

    def take_slow(self):
        """``(requests, lost)``: the slow requests noted since the last call, and how many found no room."""
        return take_notes(&self.state.watch)

    def set_sampling(self, int64_t every, *, bint follows_parents=True, bint is_traced=True):
        """Which requests the compiled path leaves to Python, to be traced; none unless ``is_traced``.

        One in ``every`` (0: none) of those without a parent; with ``follows_parents`` those whose parent is sampled.
        """
        set_sampling(&self.state.watch, every, follows_parents, is_traced)

    def take_sample(self):
        """Whether to trace a request that has no parent: one that the compiled path left, or the next in turn."""
        return bool(take_sample(&self.state.watch))

    def counters(self):
        """A consistent ``SchedulerCounters`` snapshot."""
        return describe_counters(&self.state.counters, self.pending, self.in_flight)
