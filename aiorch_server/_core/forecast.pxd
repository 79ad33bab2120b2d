# When one more request would be answered, and which of those that wait cannot be answered in time any more.
#
# Contract: pure, over a queue whose lock the caller holds. Both need a curve; without one nothing is foretold, nobody is
# late. A request that has nobody before it is never late: were the curve wrong, nobody would find out otherwise.

from libc.stdint cimport int64_t

from aiorch_server._core.batch_former cimport BatchPolicy
from aiorch_server._core.queue cimport Queue
from aiorch_server._core.request cimport Request

cdef enum:
    MAX_FORETOLD = 64       # instances that a forecast looks at; with more of them it is a little too dark
    USUAL_PAUSE_NS = 1000000000     # where nobody knows how long a run takes
    MIN_PAUSE_NS = 1000000
    MAX_PAUSE_NS = 30000000000


cdef struct Forecast:
    int64_t finish_ns       # when the request would be answered
    int64_t late_ns         # by how much that is too late for its end, less the policy's margin; 0: it is not


# The end of the last of a row of batches: `batches` of the cap, then one of `rows`. `free_ns` tells when each of the
# `n` instances is free (in the past: it is now), in any order; it is overwritten.
cdef int64_t finish_of(const BatchPolicy *policy, int64_t *free_ns, int n, int64_t batches, int64_t rows,
                       int64_t now_ns) noexcept nogil
# For a bound request with its level and times set, which is not in the queue yet; `free_ns` and `n` as above. Only who
# would be served before it counts.
cdef void foretell(const Queue *queue, const BatchPolicy *policy, const Request *request, int64_t *free_ns, int n,
                   int64_t now_ns, Forecast *forecast) noexcept nogil
# How long whoever finds no room had better stay away: until half of what waits will have been served, as far as one knows.
cdef int64_t find_pause(const Queue *queue, const BatchPolicy *policy) noexcept nogil
# For an instance that is free now: takes out, as a chain linked by `next`, whoever would have to be served next and cannot
# be answered in time, or only by a batch so small that others would be late for it; by how much they would be late is their
# retry_after_ns. In place of a tenant that holds less, others go first. NULL: nobody. Never the last one.
cdef Request *remove_late(Queue *queue, const BatchPolicy *policy, int64_t now_ns) noexcept nogil
