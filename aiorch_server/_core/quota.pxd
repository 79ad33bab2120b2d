# A tenant's quota: requests and rows per second, and how many requests it may have in flight, over all doors together.
#
# Each rate is a bucket that holds what one second brings (but at least 1), and is kept as one number: the time at which
# it will be full again. Taking n moves that time by n / rate; there is enough as long as it lies no further ahead than
# the whole bucket takes to fill. A request with more rows than the bucket holds needs a full one and leaves it in debt,
# so that it is served, and the rate holds on average. Rates are right to 1 ns per request.
#
# Tokens buy a place in a queue, or a turn on the Python plane. Who is refused by a queue (full, closed) gets them back;
# who is served, fails, expires or gives up does not.
#
# In flight: from admit() until leave(), once each. A request record carries its quota and leaves it in free_request,
# which is where every record ends, whatever became of it; one that was cancelled while it runs counts until it is settled.
#
# Ownership: counted references: the Quota object's, one for each pass (passes.pxd), one for each admission in flight.
# Threads: any, with or without the interpreter lock. `lock` is held for some ten nanoseconds, by nobody who waits.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint64_t

from aiorch_server._core.request cimport Request, pthread_mutex_t


cdef enum:
    MAX_TENANT_BYTES = 128
    REFUSAL_BYTES = 320         # room for the text of a refusal, with its end


cdef enum QuotaBound:
    WITHIN_BOUNDS = 0
    BOUND_REQUESTS = 1          # per second
    BOUND_ROWS = 2              # per second
    BOUND_IN_FLIGHT = 3
    N_BOUNDS = 4


cdef struct Rate:
    double per_s                # 0: no bound
    int64_t full_at_ns          # CLOCK_MONOTONIC; in the past: it is full


cdef struct QuotaState:
    int references
    pthread_mutex_t lock        # guards the bounds, the buckets and the counts
    Rate requests
    Rate rows
    int64_t max_in_flight       # 0: no bound
    uint64_t admitted
    uint64_t refused[N_BOUNDS]  # by the bound that was exceeded
    int64_t in_flight           # atomic: only admit() adds, under the lock
    size_t tenant_size          # constant, as is the text
    char tenant[MAX_TENANT_BYTES + 1]


# What a refusal says.
cdef struct QuotaRefusal:
    QuotaBound bound
    double limit
    int64_t retry_after_ns


cdef void retain_quota(QuotaState *quota) noexcept nogil
cdef void release_quota(QuotaState *quota) noexcept nogil
# Takes one request of `rows` rows from all bounds, and a reference; or takes nothing and says which one is exceeded.
cdef QuotaBound admit(QuotaState *quota, int64_t rows, int64_t now_ns, QuotaRefusal *refusal) noexcept nogil
# It is over: no longer in flight. Gives the reference back.
cdef void leave(QuotaState *quota) noexcept nogil
# No queue took it: puts back what admit() took of the rates. It is still in flight.
cdef void give_back(QuotaState *quota, int64_t rows) noexcept nogil
# The words, as UTF-8 with a NUL, into REFUSAL_BYTES.
cdef void write_refusal(const QuotaState *quota, const QuotaRefusal *refusal, char *text) noexcept nogil

# For dispatch, with a bound request that nobody else has seen. False: it was refused with RESOURCE_EXHAUSTED and a time
# to try again, and is not in flight.
cdef bint admit_request(QuotaState *quota, Request *request, int64_t now_ns) noexcept nogil


cdef class Quota:
    cdef QuotaState *state
    cdef object __weakref__


# One request of the Python plane, as a context manager.
cdef class Admission:
    cdef QuotaState *quota      # with the reference of admit(); NULL once it is over
    cdef int64_t rows
