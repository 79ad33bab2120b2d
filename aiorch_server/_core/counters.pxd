# What is counted of one scheduler's requests, for statistics and metrics: numbers under a lock of their own.
#
# Who answers a batch adds to them once, under `lock`; everything else goes through the functions. Any thread.

from libc.stdint cimport int64_t, uint64_t

from aiorch_server._core.histogram cimport HistogramState
from aiorch_server._core.request cimport Request, pthread_mutex_t


cdef enum:
    N_PHASES = 7


cdef enum Phase:
    PHASE_QUEUE = 0         # enqueued -> an instance was free (or taken, if sooner)
    PHASE_BATCH_WAIT = 1    # an instance was free and waited for company
    PHASE_COMPUTE_INPUT = 2
    PHASE_INFER = 3
    PHASE_COMPUTE_OUTPUT = 4
    PHASE_TOTAL = 5         # message complete -> answer encoded
    PHASE_WAIT = 6          # enqueued -> taken: the first two together


cdef enum FailureReason:
    FAILURE_REJECTED = 0
    FAILURE_CANCELED = 1
    FAILURE_BACKEND = 2
    FAILURE_OTHER = 3
    N_REASONS = 4


cdef struct BatchSizeCount:
    uint64_t executions
    uint64_t input_ns
    uint64_t infer_ns
    uint64_t output_ns


cdef struct Counters:
    pthread_mutex_t lock            # guards the rest
    uint64_t rows
    uint64_t executions
    uint64_t fail
    uint64_t fail_ns
    uint64_t failures[N_REASONS]
    int64_t last_inference_ns       # CLOCK_MONOTONIC
    HistogramState phases[N_PHASES]
    BatchSizeCount *batch_sizes     # owned: by rows, n_batch_sizes of them; what is larger counts in the last
    int64_t n_batch_sizes


# Of zeroed memory. False: out of memory, there is nothing to drop.
cdef bint init_counters(Counters *counters, int64_t max_rows) noexcept nogil
cdef void drop_counters(Counters *counters) noexcept nogil
# Counts one failed request.
cdef void count_failure(Counters *counters, const Request *request, FailureReason reason, int64_t now) noexcept nogil
# A consistent SchedulerCounters snapshot, with what others have counted by its field; with the interpreter lock.
cdef object describe_counters(Counters *counters, dict others)
# {upper bound in ns: count} of the phase total, in the histogram's own buckets; with the interpreter lock.
cdef object describe_durations(Counters *counters)
