# Priority levels of one scheduler and what holds for the requests of each: how many may wait, how long, and what then.
#
# Where priorities are not used there is one level, 0; else levels count from 1, the most urgent. A request's own
# `level` is twice that, and odd once it was delayed.
#
# Contract: constant once made, but for `n`, which the scheduler's lock guards.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from aiorch_server._core.queue cimport Queue
from aiorch_server._core.request cimport Request

# The longest delay or timeout in microseconds, 146 years: added to the clock it still is a number of 63 bits.
cdef extern from * nogil:
    """
    #define AIORCH_MAX_SPAN_US ((int64_t) ((1LL << 62) / 1000))
    """
    const int64_t MAX_SPAN_US "AIORCH_MAX_SPAN_US"

cdef enum:
    MAX_LEVELS = 65536


cdef struct LevelPolicy:
    int64_t expiry_ns       # 0: none
    int64_t max_requests    # 0: none but the queue's own
    bint allows_override    # a request may bring a shorter time
    bint delays             # who waited too long is served after the others of its level, not refused
    int64_t n               # that wait now; counted only where levels are bounded


cdef struct Levels:
    LevelPolicy *policies   # owned: count + 1 of them; the first is for where priorities are not used
    uint64_t count          # 0: priorities are not used
    uint64_t default_level
    bint is_bounded         # some level has max_requests
    bint has_delays         # some level delays


# Of zeroed memory; `own_policy` holds where priorities are not used, `policies` are none or one for each level:
# (max_requests, timeout_us, allows_override, delays). ValueError, MemoryError: nothing was allocated.
cdef object make_levels(Levels *levels, uint64_t count, uint64_t default_level, tuple own_policy, policies)
cdef void free_levels(Levels *levels) noexcept nogil
# Queues again, behind the others, what its level delays of a chain of expired requests; gives the rest.
cdef Request *delay_expired(Levels *levels, Queue *queue, Request *expired, int64_t now) noexcept nogil


cdef inline LevelPolicy *policy_of(const Levels *levels, const Request *request) noexcept nogil:
    return &levels.policies[request.level >> 1]

# False: there is no such level. Priority 0: the default one.
cdef inline bint set_level(const Levels *levels, Request *request, uint64_t priority) noexcept nogil:
    if levels.count:
        if priority > levels.count:
            return False
        request.level = <uint32_t> (priority or levels.default_level) << 1
    return True

# When the request's time in the queue is over; timeout_us as its caller gave it, 0 for none.
cdef inline void set_expiry(const LevelPolicy *policy, Request *request, int64_t timeout_us, int64_t now) noexcept nogil:
    cdef int64_t expires_ns
    request.expires_ns = now + policy.expiry_ns if policy.expiry_ns else 0
    # Triton: a request may shorten the policy's time, never lengthen it
    if timeout_us and policy.allows_override:
        expires_ns = now + min(timeout_us, MAX_SPAN_US) * 1000
        if request.expires_ns == 0 or expires_ns < request.expires_ns:
            request.expires_ns = expires_ns

# A request is not queued any more.
cdef inline void count_out(Levels *levels, const Request *request) noexcept nogil:
    if levels.is_bounded:
        policy_of(levels, request).n -= 1
