"""Instances take batches, without the interpreter lock; Python makes a scheduler, closes it and asks it."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from aiorch_server._core.batch_former cimport MAX_INSTANCES, MAX_PREFERRED, BatchPolicy, FormedBatch, change_policy, form_batch
from aiorch_server._core.counters cimport describe_counters, describe_durations
from aiorch_server._core.curve cimport describe_curve
from aiorch_server._core.forecast cimport find_pause, remove_late
from aiorch_server._core.levels cimport MAX_SPAN_US, count_out, delay_expired, make_levels
from aiorch_server._core.observation cimport (
    Observed,
    Recording,
    RunCount,
    RunTimes,
    close_slots,
    count_busy,
    describe_observed,
    describe_recording,
    free_recording,
    new_recording,
)
from aiorch_server._core.queue cimport Bucket, remove_all, remove_expired
from aiorch_server._core.request cimport REQUEST_RUNNING, now_ns, pthread_mutex_lock, pthread_mutex_unlock
from aiorch_server._core.scheduler_state cimport (
    Run,
    begin_run,
    close_scheduler,
    end_run,
    new_scheduler,
    pthread_cond_broadcast,
    pthread_cond_signal,
    release_scheduler,
    wait_until,
)
from aiorch_server._core.settlement cimport refuse_chain, refuse_late
from aiorch_server._core.slabs cimport note_batch
from aiorch_server._core.sweep cimport join_sweeper, leave_sweeper, mark_unserved
from aiorch_server._core.watch cimport set_sampling, take_notes, take_sample, watch_slow

from aiorch_server.types import BatchingPolicy, SchedulerObservation

cdef int UNAVAILABLE = 14

cdef double MAX_WAIT_S = 1e9
# An idle instance looks into its queue so often by itself: glibc can lose a wake-up (its bug 25847).
cdef int64_t MAX_NAP_NS = 1000000000

# Requests that a recording keeps between two looks: 12 MB.
MAX_RECORDED = 1000000

# Requests and bytes that one queue holds when the configuration names no bound.
DEFAULT_MAX_REQUESTS = 16384
DEFAULT_MAX_BYTES = 1 << 30


cdef void abandon_queued(SchedulerState *state, int code, const char *text) noexcept nogil:
    cdef Request *chain
    close_scheduler(state)
    pthread_mutex_lock(&state.lock)
    chain = remove_all(&state.queue)
    mark_unserved(state, chain, &state.observed.failed)
    pthread_mutex_unlock(&state.lock)
    refuse_chain(state, chain, code, text, 0)


cdef inline bint must_leave(SchedulerState *state) noexcept nogil:
    """Whether the instance that asks is one too many; who is asked to leave passes its wake-up on."""
    if state.retiring == 0 or state.is_closed:
        return False
    state.retiring -= 1
    if state.waiting and state.queue.n:
        pthread_cond_signal(&state.due)
    return True


cdef Request *take_batch(SchedulerState *state, Run *run, int *members, int64_t *rows, int64_t *free_since) noexcept nogil:
    cdef FormedBatch batch
    cdef Request *request
    cdef Request *expired
    cdef Request *late
    cdef int64_t now = now_ns()
    cdef int64_t wake_ns, pause_ns
    cdef bint another_is_due
    free_since[0] = now
    pthread_mutex_lock(&state.lock)
    if run.rows and not run.is_spoilt:
        count_busy(&state.observed, run.rows, now - run.taken_ns)
    end_run(state, run)
    while True:
        if must_leave(state):
            pthread_mutex_unlock(&state.lock)
            return NULL
        expired = remove_expired(&state.queue, now)
        if expired != NULL and state.levels.has_delays:
            expired = delay_expired(&state.levels, &state.queue, expired, now)
        if expired != NULL:
            mark_unserved(state, expired, &state.observed.failed)
            pause_ns = find_pause(&state.queue, &state.policy)
            pthread_mutex_unlock(&state.lock)
            refuse_chain(state, expired, 0, NULL, pause_ns)
            now = now_ns()
            pthread_mutex_lock(&state.lock)
            continue
        late = remove_late(&state.queue, &state.policy, now)
        if late != NULL:
            mark_unserved(state, late, &state.observed.dropped_late)
            pthread_mutex_unlock(&state.lock)
            refuse_late(state, late)
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
        count_out(&state.levels, request)
        request.state = REQUEST_RUNNING
        request.taken_ns = now
        request = request.next
    note_batch(&state.slab, batch.rows)
    begin_run(state, run, batch.rows, now)
    state.observed.running += batch.members
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
        sizes = sorted(set(preferred_batch_sizes))
        max_rows = max(1, spec.state.max_batch_size)
        if len(sizes) > MAX_PREFERRED:
            raise ValueError(f"{len(sizes)} preferred batch sizes; at most {MAX_PREFERRED} work")
        if sizes and not 1 <= min(sizes) <= max(sizes) <= max_rows:
            raise ValueError(f"preferred batch sizes {sizes} must lie within 1..{max_rows}")
        if min(max_queue_delay_us, max_queue_size, max_queue_bytes, default_timeout_us) < 0:
            raise ValueError("delays, sizes and timeouts must not be negative")
        if max(max_queue_delay_us, default_timeout_us) > MAX_SPAN_US:
            raise ValueError(f"delays and timeouts are at most {MAX_SPAN_US} microseconds")
        policies = list(level_policies)
        if preserve_ordering and (
                priority_levels > 1 or delay_expired or any([delays for _, _, _, delays in policies])):
            raise ValueError("answers cannot leave in the order of arrival where requests overtake each other")
        self.spec = spec
        self.state = new_scheduler(spec.state)
        if self.state == NULL:
            raise MemoryError
        make_levels(&self.state.levels, priority_levels, default_priority_level,
                    (0, default_timeout_us, allow_timeout_override, delay_expired), policies)
        self.state.policy.max_rows = self.largest_rows()
        self.state.policy.delay_ns = max_queue_delay_us * 1000
        self.state.policy.n_preferred = len(sizes)
        for i, size in enumerate(sizes):
            self.state.policy.preferred[i] = size
        self.state.max_requests = max_queue_size or <int64_t> DEFAULT_MAX_REQUESTS
        self.state.max_bytes = max_queue_bytes or <int64_t> DEFAULT_MAX_BYTES
        self.state.keeps_order = preserve_ordering
        join_sweeper(self.state)

    def __dealloc__(self):
        if self.state != NULL:
            with nogil:
                leave_sweeper(self.state)
                abandon_queued(
                    self.state, UNAVAILABLE,
                    b"Server is stopping, scheduler for model has stopped accepting new inference requests")
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
        close_scheduler(self.state)

    def abandon(self, int code, str text not None):
        """Closes, and fails everything that is still queued with that gRPC code and text."""
        cdef bytes message = text.encode("utf-8", "replace")
        cdef const char *words = message
        with nogil:
            abandon_queued(self.state, code, words)

    def set_policy(self, *, max_rows=None, delay_us=None, target_us=None, margin_us=None, is_deferring=None,
                   is_shedding=None, instances=None, curve=None):
        """Changes what is given of the batching policy, for what comes from now on; instances look at it at once.

        ``max_rows`` is the cap of a batch, at most the model's own; a single larger request still runs, alone.
        ``delay_us``: how long the first of a batch may wait for company. ``target_us``: what the latency should be, 0:
        nothing is asked for. ``margin_us`` is kept free before targets and deadlines. ``is_deferring``: waiting ends when
        the target could not be kept otherwise. ``is_shedding``: what cannot be answered in time by the ``curve``, pairs
        (rows, ns) of how long an instance is busy with a batch, ascending, is refused. ``instances``: how many serve this
        queue, 0 for as many as are seen. ValueError where something is out of range: nothing was changed then.
        """
        cdef BatchPolicy new
        cdef SchedulerState *state = self.state
        delay_ns = None if delay_us is None else delay_us * 1000
        target_ns = None if target_us is None else target_us * 1000
        margin_ns = None if margin_us is None else margin_us * 1000
        pthread_mutex_lock(&state.lock)
        new = state.policy
        pthread_mutex_unlock(&state.lock)
        change_policy(&new, self.largest_rows(), max_rows, delay_ns, target_ns, margin_ns, is_deferring, is_shedding,
                      instances, curve)
        pthread_mutex_lock(&state.lock)
        new.run_ns = state.policy.run_ns        # went on meanwhile
        state.policy = new
        if state.is_closed:
            state.policy.delay_ns = 0
        pthread_cond_broadcast(&state.due)
        pthread_mutex_unlock(&state.lock)

    def policy(self):
        """The ``BatchingPolicy`` of now."""
        cdef BatchPolicy now
        pthread_mutex_lock(&self.state.lock)
        now = self.state.policy
        pthread_mutex_unlock(&self.state.lock)
        return BatchingPolicy(
            now.max_rows, now.delay_ns // 1000, now.target_ns // 1000, now.margin_ns // 1000, bool(now.is_deferring),
            bool(now.is_shedding), now.instances, describe_curve(&now.curve))

    cdef int64_t largest_rows(self):
        return max(1, self.spec.state.max_batch_size)

    def retire(self, int n):
        """The next ``n`` calls of ``take``, or those that wait in it, give False: their instances leave.

        The caller sees to it that enough others stay. A closed scheduler keeps all that it has, to serve what is queued.
        """
        if not 0 <= n <= MAX_INSTANCES:
            raise ValueError(f"{n} instances cannot leave; expected 0..{<int> MAX_INSTANCES}")
        pthread_mutex_lock(&self.state.lock)
        self.state.retiring = min(self.state.retiring + n, <int> MAX_INSTANCES)
        pthread_cond_broadcast(&self.state.due)
        pthread_mutex_unlock(&self.state.lock)

    def read_arrivals(self):
        """How many requests came since load; costs next to nothing."""
        return self.state.observed.arrivals

    def observe(self):
        """A consistent ``SchedulerObservation``."""
        cdef SchedulerState *state = self.state
        cdef Observed now
        cdef int64_t at_ns, waiting, waiting_rows = 0
        cdef int instances, busy
        cdef const Bucket *bucket
        cdef RunCount *runs = <RunCount *> calloc(<size_t> state.observed.n_runs, sizeof(RunCount))
        cdef RunTimes *times = <RunTimes *> calloc(<size_t> state.observed.n_times, sizeof(RunTimes))
        if runs == NULL or times == NULL:
            free(runs)
            free(times)
            raise MemoryError
        at_ns = now_ns()
        with nogil:
            pthread_mutex_lock(&state.lock)
            close_slots(&state.observed, at_ns)
            now = state.observed
            memcpy(runs, now.runs, <size_t> now.n_runs * sizeof(RunCount))
            memcpy(times, now.times, <size_t> now.n_times * sizeof(RunTimes))
            now.runs, now.times = runs, times
            waiting, busy, instances = state.queue.n, state.n_runs, state.waiting + state.n_runs
            bucket = state.queue.buckets
            while bucket != NULL:
                waiting_rows += bucket.rows
                bucket = bucket.next
            pthread_mutex_unlock(&state.lock)
        try:
            return SchedulerObservation(
                at_ns=at_ns, waiting=waiting, waiting_rows=waiting_rows, instances=instances, busy_instances=busy,
                durations=self.durations(), **describe_observed(&now))
        finally:
            free(runs)
            free(times)

    def start_recording(self, int64_t max_requests=MAX_RECORDED):
        """From now on the time and the rows of each request that comes are noted, up to ``max_requests`` between two looks.

        ValueError where somebody records already, or the number is not 1 to ``MAX_RECORDED``.
        """
        cdef Recording *made
        cdef Recording *kept
        if not 1 <= max_requests <= MAX_RECORDED:
            raise ValueError(f"a recording of {max_requests} requests: expected 1..{MAX_RECORDED}")
        made = new_recording(max_requests, now_ns())
        if made == NULL:
            raise MemoryError
        with nogil:
            pthread_mutex_lock(&self.state.lock)
            kept = self.state.observed.recording
            if kept == NULL:
                self.state.observed.recording = made
            pthread_mutex_unlock(&self.state.lock)
        if kept != NULL:
            free_recording(made)
            raise ValueError("its traffic is being recorded already: one recording at a time")

    def take_recording(self):
        """What came since the last look: ``(times, rows, lost)``, and how many found no room.

        ``times`` are native int64 nanoseconds since ``start_recording``, ascending, ``rows`` native int32. ValueError where
        nobody records.
        """
        cdef Observed *observed = &self.state.observed
        cdef Recording *taken = NULL
        cdef Recording *fresh
        cdef int64_t size
        with nogil:
            pthread_mutex_lock(&self.state.lock)
            size = observed.recording.size if observed.recording != NULL else 0
            pthread_mutex_unlock(&self.state.lock)
        fresh = new_recording(size, 0) if size else NULL
        if size and fresh == NULL:
            raise MemoryError
        with nogil:
            pthread_mutex_lock(&self.state.lock)
            if fresh != NULL and observed.recording != NULL:
                taken = observed.recording
                fresh.start_ns, fresh.last_ns = taken.start_ns, taken.last_ns
                observed.recording = fresh
            pthread_mutex_unlock(&self.state.lock)
        if taken == NULL:
            free_recording(fresh)
            raise ValueError("nobody records")
        try:
            return describe_recording(taken)
        finally:
            free_recording(taken)

    def stop_recording(self):
        """Notes no more, and gives back what it took; nothing where nobody records."""
        cdef Recording *kept
        with nogil:
            pthread_mutex_lock(&self.state.lock)
            kept, self.state.observed.recording = self.state.observed.recording, NULL
            pthread_mutex_unlock(&self.state.lock)
        free_recording(kept)

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
        cdef uint64_t refused_late, dropped_late
        cdef int64_t pending, in_flight
        pthread_mutex_lock(&self.state.lock)
        pending, in_flight = self.state.queue.n, self.state.in_flight
        refused_late, dropped_late = self.state.observed.refused_late, self.state.observed.dropped_late
        pthread_mutex_unlock(&self.state.lock)
        return describe_counters(&self.state.counters, {
            "pending": pending, "in_flight": in_flight, "refused_late": refused_late, "dropped_late": dropped_late})

    def durations(self):
        """How long answered requests took in all: ``{upper_ns: count}``, each below its bound and not below the next
        smaller bucket's; finer than the histograms of ``counters``.
        """
        return describe_durations(&self.state.counters)
