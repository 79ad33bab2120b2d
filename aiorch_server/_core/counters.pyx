"""Counts of requests, batches and durations, and their description for Python; see counters.pxd."""

from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from aiorch_server._core.histogram cimport Histogram
from aiorch_server._core.request cimport (
    now_ns,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)

import time

from aiorch_server.types import BatchStatistics, Duration, PhaseHistogram, SchedulerCounters

cdef enum:
    MAX_BATCH_SIZES = 4096

_PHASES = ("queue", "batch_wait", "compute_input", "infer", "compute_output", "total", "wait")
_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
# Powers of two from 8 us to 69 s: edges of the log-linear buckets, so that the coarse counts are exact.
_BOUNDS_NS = tuple(1 << bit for bit in range(13, 37))


cdef bint init_counters(Counters *counters, int64_t max_rows) noexcept nogil:
    counters.n_batch_sizes = max(1, min(max_rows, MAX_BATCH_SIZES))
    counters.batch_sizes = <BatchSizeCount *> calloc(<size_t> counters.n_batch_sizes, sizeof(BatchSizeCount))
    if counters.batch_sizes == NULL:
        return False
    pthread_mutex_init(&counters.lock, NULL)
    return True


cdef void drop_counters(Counters *counters) noexcept nogil:
    free(counters.batch_sizes)
    pthread_mutex_destroy(&counters.lock)


cdef void count_failure(Counters *counters, const Request *request, FailureReason reason, int64_t now) noexcept nogil:
    pthread_mutex_lock(&counters.lock)
    counters.fail += 1
    counters.fail_ns += <uint64_t> (now - request.received_ns)
    counters.failures[<int> reason] += 1
    pthread_mutex_unlock(&counters.lock)


cdef object describe_counters(Counters *counters, dict others):
    cdef Counters *copy = <Counters *> calloc(1, sizeof(Counters))
    cdef BatchSizeCount *sizes = <BatchSizeCount *> calloc(<size_t> counters.n_batch_sizes, sizeof(BatchSizeCount))
    if copy == NULL or sizes == NULL:
        free(copy)
        free(sizes)
        raise MemoryError
    try:
        with nogil:
            pthread_mutex_lock(&counters.lock)
            memcpy(copy, counters, sizeof(Counters))
            memcpy(sizes, counters.batch_sizes, <size_t> counters.n_batch_sizes * sizeof(BatchSizeCount))
            pthread_mutex_unlock(&counters.lock)
        return describe_copy(copy, sizes, others)
    finally:
        free(copy)
        free(sizes)


cdef object describe_durations(Counters *counters):
    cdef Histogram copy = Histogram.__new__(Histogram)
    with nogil:
        pthread_mutex_lock(&counters.lock)
        memcpy(&copy.state, &counters.phases[<int> PHASE_TOTAL], sizeof(HistogramState))
        pthread_mutex_unlock(&counters.lock)
    return copy.bounds()


cdef object duration_of(const HistogramState *histogram):
    return Duration(histogram.count, histogram.sum_ns)


cdef object coarsen(const HistogramState *histogram):
    cdef Histogram fine = Histogram.copy_of(histogram)
    below = [fine.count_below(bound) for bound in _BOUNDS_NS]
    counts = [after - before for before, after in zip([0, *below], [*below, fine.count])]
    return PhaseHistogram(tuple([bound / 1e9 for bound in _BOUNDS_NS]), tuple(counts), histogram.sum_ns / 1e9)


cdef object describe_copy(const Counters *counters, const BatchSizeCount *sizes, dict others):
    queue = Duration(counters.phases[<int> PHASE_QUEUE].count,
                     counters.phases[<int> PHASE_QUEUE].sum_ns + counters.phases[<int> PHASE_BATCH_WAIT].sum_ns)
    last_ms = 0
    if counters.last_inference_ns:
        last_ms = int(time.time() * 1000) - (now_ns() - counters.last_inference_ns) // 1000000
    return SchedulerCounters(
        rows=counters.rows,
        executions=counters.executions,
        success=duration_of(&counters.phases[<int> PHASE_TOTAL]),
        fail=Duration(counters.fail, counters.fail_ns),
        failures={reason: counters.failures[i] for i, reason in enumerate(_REASONS)},
        queue=queue,
        compute_input=duration_of(&counters.phases[<int> PHASE_COMPUTE_INPUT]),
        compute_infer=duration_of(&counters.phases[<int> PHASE_INFER]),
        compute_output=duration_of(&counters.phases[<int> PHASE_COMPUTE_OUTPUT]),
        batch_sizes=tuple([
            BatchStatistics(
                i + 1,
                Duration(sizes[i].executions, sizes[i].input_ns),
                Duration(sizes[i].executions, sizes[i].infer_ns),
                Duration(sizes[i].executions, sizes[i].output_ns),
            )
            for i in range(counters.n_batch_sizes)
            if sizes[i].executions
        ]),
        last_inference_ms=last_ms,
        phases={phase: coarsen(&counters.phases[i]) for i, phase in enumerate(_PHASES)},
        **others,
    )
