"""Quotas of tenants: two buckets and a count; see quota.pxd for the rules."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.math cimport ceil
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from aiorch_server._core.request cimport (
    aiorch_add_reference,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    refuse_request,
)

from aiorch_server.errors import AnswerTooLate, ModelNotReady, QueueFull, QuotaExceeded, ServerStopping
from aiorch_server.types import QuotaCounters

cdef extern from * nogil:
    """
    static inline int64_t aiorch_count_flight(int64_t *at, int64_t by) { return __atomic_add_fetch(at, by, __ATOMIC_ACQ_REL); }
    """
    int64_t aiorch_count_flight(int64_t *at, int64_t by)

cdef enum:
    RESOURCE_EXHAUSTED = 8
    SECOND_NS = 1000000000
    MAX_DEBT_NS = 3600000000000         # what one request can cost at most: an hour of the rate

cdef double MIN_PER_S = 0.001
cdef double MAX_PER_S = 1e8


cdef void retain_quota(QuotaState *quota) noexcept nogil:
    aiorch_add_reference(&quota.references, 1)


cdef void release_quota(QuotaState *quota) noexcept nogil:
    if aiorch_add_reference(&quota.references, -1) == 0:
        pthread_mutex_destroy(&quota.lock)
        free(quota)


# ------------------------------------------------------------------------------------------------------------- buckets
cdef inline int64_t find_cost_ns(const Rate *rate, int64_t n) noexcept nogil:
    """How long the bucket takes to bring n."""
    cdef double cost_ns = ceil(<double> n * SECOND_NS / rate.per_s)
    return <int64_t> cost_ns if cost_ns < MAX_DEBT_NS else MAX_DEBT_NS


cdef inline int64_t find_wait_ns(const Rate *rate, int64_t n, int64_t now_ns) noexcept nogil:
    """How long until there is enough for n; 0: there is."""
    cdef int64_t capacity_ns, needed_ns, wait_ns
    if rate.per_s == 0:
        return 0
    capacity_ns = max(<int64_t> SECOND_NS, find_cost_ns(rate, 1))
    needed_ns = min(find_cost_ns(rate, n), capacity_ns)
    wait_ns = max(rate.full_at_ns, now_ns) + needed_ns - capacity_ns - now_ns
    return max(wait_ns, <int64_t> 0)


cdef inline void draw(Rate *rate, int64_t n, int64_t now_ns) noexcept nogil:
    if rate.per_s != 0:
        rate.full_at_ns = max(rate.full_at_ns, now_ns) + find_cost_ns(rate, n)


cdef inline void put_back(Rate *rate, int64_t n) noexcept nogil:
    if rate.per_s != 0:
        rate.full_at_ns -= find_cost_ns(rate, n)


cdef inline void set_rate(Rate *rate, double per_s) noexcept nogil:
    if rate.per_s != per_s:
        rate.per_s, rate.full_at_ns = per_s, 0


# ---------------------------------------------------------------------------------------------------------- admissions
cdef QuotaBound find_bound(QuotaState *quota, int64_t rows, int64_t now_ns, QuotaRefusal *refusal) noexcept nogil:
    """The bound that is exceeded, of the rates the one that lasts longer; under the lock."""
    cdef int64_t requests_ns, rows_ns
    refusal.retry_after_ns = 0
    if quota.max_in_flight and aiorch_count_flight(&quota.in_flight, 0) >= quota.max_in_flight:
        # nobody knows when one of them is answered
        refusal.bound, refusal.limit, refusal.retry_after_ns = BOUND_IN_FLIGHT, <double> quota.max_in_flight, SECOND_NS
        return BOUND_IN_FLIGHT
    requests_ns = find_wait_ns(&quota.requests, 1, now_ns)
    rows_ns = find_wait_ns(&quota.rows, rows, now_ns)
    if requests_ns == 0 and rows_ns == 0:
        return WITHIN_BOUNDS
    if rows_ns > requests_ns:
        refusal.bound, refusal.limit, refusal.retry_after_ns = BOUND_ROWS, quota.rows.per_s, rows_ns
    else:
        refusal.bound, refusal.limit, refusal.retry_after_ns = BOUND_REQUESTS, quota.requests.per_s, requests_ns
    return refusal.bound


cdef QuotaBound admit(QuotaState *quota, int64_t rows, int64_t now_ns, QuotaRefusal *refusal) noexcept nogil:
    cdef QuotaBound bound
    pthread_mutex_lock(&quota.lock)
    bound = find_bound(quota, rows, now_ns, refusal)
    if bound == WITHIN_BOUNDS:
        draw(&quota.requests, 1, now_ns)
        draw(&quota.rows, rows, now_ns)
        quota.admitted += 1
        aiorch_count_flight(&quota.in_flight, 1)
        retain_quota(quota)
    else:
        quota.refused[<int> bound] += 1
    pthread_mutex_unlock(&quota.lock)
    return bound


cdef void leave(QuotaState *quota) noexcept nogil:
    aiorch_count_flight(&quota.in_flight, -1)
    release_quota(quota)


cdef void give_back(QuotaState *quota, int64_t rows) noexcept nogil:
    pthread_mutex_lock(&quota.lock)
    put_back(&quota.requests, 1)
    put_back(&quota.rows, rows)
    quota.admitted -= 1
    pthread_mutex_unlock(&quota.lock)


cdef bint is_as_new(QuotaState *quota, int64_t now_ns) noexcept nogil:
    cdef bint found
    pthread_mutex_lock(&quota.lock)
    # Who holds a reference beside the object could take from it later: a pass, or a request in flight.
    found = (aiorch_add_reference(&quota.references, 0) == 1
             and (quota.requests.per_s == 0 or quota.requests.full_at_ns <= now_ns)
             and (quota.rows.per_s == 0 or quota.rows.full_at_ns <= now_ns))
    pthread_mutex_unlock(&quota.lock)
    return found


cdef void write_refusal(const QuotaState *quota, const QuotaRefusal *refusal, char *text) noexcept nogil:
    cdef int64_t retry_ms = (refusal.retry_after_ns + 999999) // 1000000
    if refusal.bound == BOUND_IN_FLIGHT:
        snprintf(text, REFUSAL_BYTES, b"quota of tenant '%s' exceeded: %.10g requests in flight; "
                 b"try again when one of them is answered", quota.tenant, refusal.limit)
    else:
        snprintf(text, REFUSAL_BYTES, b"quota of tenant '%s' exceeded: %.10g %s/s; try again in %lld.%03d s",
                 quota.tenant, refusal.limit, b"rows" if refusal.bound == BOUND_ROWS else b"requests",
                 <long long> (retry_ms // 1000), <int> (retry_ms % 1000))


cdef void leave_with_request(void *quota) noexcept nogil:
    leave(<QuotaState *> quota)


cdef bint admit_request(QuotaState *quota, Request *request, int64_t now_ns) noexcept nogil:
    cdef QuotaRefusal refusal
    cdef char text[REFUSAL_BYTES]
    if admit(quota, request.rows, now_ns, &refusal) == WITHIN_BOUNDS:
        request.quota, request.leave_quota = quota, leave_with_request
        return True
    write_refusal(quota, &refusal, text)
    refuse_request(request, RESOURCE_EXHAUSTED, text)
    request.retry_after_ns = refusal.retry_after_ns
    return False


# ---------------------------------------------------------------------------------------------------------- for Python
#: Where these end it, no queue took the request.
cdef tuple QUEUE_REFUSALS = (QueueFull, AnswerTooLate, ServerStopping, ModelNotReady)


cdef double check_rate(str name, object per_s) except -1:
    cdef double value = per_s
    if value == 0 or MIN_PER_S <= value <= MAX_PER_S:
        return value
    raise ValueError(f"{name} is {per_s!r}; expected 0 (no bound), or {MIN_PER_S:g} to {MAX_PER_S:.0f}")


cdef class Quota:
    """What one tenant may do, over all doors together; 0 is no bound.

    Rates are buckets of one second's worth, at least 1; they begin full. ValueError for a tenant of more than 128 bytes
    and for bounds below 0, or rates that are no use. Any thread.
    """

    def __cinit__(self, str tenant not None, *, requests_per_s=0, rows_per_s=0, max_in_flight=0):
        cdef bytes name = tenant.encode()
        if not 0 < len(name) <= MAX_TENANT_BYTES or b"\0" in name:
            raise ValueError(f"a tenant's name has 1 to {MAX_TENANT_BYTES} bytes, not {len(name)}, and no NUL")
        self.state = <QuotaState *> calloc(1, sizeof(QuotaState))
        if self.state == NULL:
            raise MemoryError
        self.state.references = 1
        pthread_mutex_init(&self.state.lock, NULL)
        self.state.tenant_size = <size_t> len(name)
        memcpy(self.state.tenant, PyBytes_AS_STRING(name), <size_t> PyBytes_GET_SIZE(name))
        self.set(requests_per_s=requests_per_s, rows_per_s=rows_per_s, max_in_flight=max_in_flight)

    def __dealloc__(self):
        if self.state != NULL:
            release_quota(self.state)

    @property
    def tenant(self):
        """Whose it is."""
        return self.state.tenant[:self.state.tenant_size].decode()

    @property
    def requests_per_s(self):
        """0: no bound."""
        return self.state.requests.per_s

    @property
    def rows_per_s(self):
        """0: no bound."""
        return self.state.rows.per_s

    @property
    def max_in_flight(self):
        """0: no bound."""
        return self.state.max_in_flight

    def set(self, *, requests_per_s=0, rows_per_s=0, max_in_flight=0):
        """New bounds from now on, and for what is in flight already; a rate that changes begins full. ValueError."""
        cdef double requests = check_rate("requests_per_s", requests_per_s)
        cdef double rows = check_rate("rows_per_s", rows_per_s)
        cdef int64_t bound = max_in_flight
        if bound < 0:
            raise ValueError(f"max_in_flight is {max_in_flight}; expected 0 (no bound) or more")
        pthread_mutex_lock(&self.state.lock)
        set_rate(&self.state.requests, requests)
        set_rate(&self.state.rows, rows)
        self.state.max_in_flight = bound
        pthread_mutex_unlock(&self.state.lock)

    def admit(self, int64_t rows, int64_t now_ns):
        """Takes one request of ``rows`` rows in; ``now_ns`` is that of the monotonic clock.

        Raises QuotaExceeded, which then has taken nothing.
        """
        cdef QuotaRefusal refusal
        cdef char text[REFUSAL_BYTES]
        cdef Admission admission = Admission.__new__(Admission)
        if rows < 0:
            raise ValueError(f"rows is {rows}; expected 0 or more")
        if admit(self.state, rows, now_ns, &refusal) != WITHIN_BOUNDS:
            write_refusal(self.state, &refusal, text)
            raise QuotaExceeded((<bytes> text).decode("utf-8", "replace"), refusal.retry_after_ns)
        admission.quota, admission.rows = self.state, rows
        return admission

    def is_as_new(self, int64_t now_ns):
        """Whether another object in its place would not be noticed: buckets full, and nobody counts with it but by this
        object.
        """
        return is_as_new(self.state, now_ns)

    def counters(self):
        """A consistent ``QuotaCounters`` snapshot."""
        cdef QuotaState *quota = self.state
        cdef uint64_t admitted
        cdef uint64_t refused[N_BOUNDS]
        pthread_mutex_lock(&quota.lock)
        admitted = quota.admitted
        memcpy(refused, quota.refused, sizeof(refused))
        pthread_mutex_unlock(&quota.lock)
        return QuotaCounters(admitted, refused[<int> BOUND_REQUESTS], refused[<int> BOUND_ROWS],
                             refused[<int> BOUND_IN_FLIGHT], aiorch_count_flight(&quota.in_flight, 0))


cdef class Admission:
    """One request in flight: over with ``release``, with the end of ``with``, or at the latest with this object.

    Where ``with`` ends because no queue took the request (QueueFull, AnswerTooLate, ServerStopping, ModelNotReady), what it took of the
    rates is given back.
    """

    def __init__(self):
        raise TypeError("admissions come from Quota.admit")

    def __dealloc__(self):
        if self.quota != NULL:
            leave(self.quota)

    def release(self, *, bint refund=False):
        """The request is over; with ``refund`` no queue took it. Nothing the second time."""
        cdef QuotaState *quota = self.quota
        if quota == NULL:
            return
        self.quota = NULL
        if refund:
            give_back(quota, self.rows)
        leave(quota)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.release(refund=isinstance(error, QUEUE_REFUSALS))
