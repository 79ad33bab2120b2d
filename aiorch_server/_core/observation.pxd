# What a tuner needs to know of a scheduler's traffic: what came and when, what became of it, and how long runs took.
#
# A request is counted once when it comes and once when its end is certain, so that at any time
# arrivals = answered + failed + refused + dropped + waiting (the queue's) + running.
# Contract: the scheduler's lock guards all of it; times never run backwards but for what threads do between looking at the
# clock and taking the lock, which counts as no time.

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from aiorch_server._core.histogram cimport N_BUCKETS, bucket_of

cdef enum:
    MAX_TIMED_SIZES = 64    # batch sizes whose run times are kept one by one, so that rare stalls can be told apart
    N_TIMES = 313           # pairs of the histogram's buckets: 8 to the power of two

cdef extern from * nogil:
    """
    #define AIORCH_SLOT_NS ((int64_t) 10000000)
    """
    const int64_t SLOT_NS "AIORCH_SLOT_NS"


# When requests came and how many rows they had, since somebody began to record; nothing of what is in them.
cdef struct Recording:
    int64_t start_ns
    int64_t last_ns                 # of the newest, from the start: times must ascend
    int64_t n
    int64_t size                    # room
    uint64_t lost                   # that found no room since the last look
    int64_t *times_ns               # owned; from the start
    int32_t *rows                   # owned

cdef struct RunCount:
    uint64_t executions
    uint64_t busy_ns
    double busy_squares


cdef struct RunTimes:
    uint32_t counts[N_TIMES]        # may run over: differences modulo 2**32 are right


cdef struct Observed:               # zero-initialised, then init_observed
    uint64_t arrivals
    uint64_t arrived_rows
    uint64_t answered
    uint64_t answered_rows
    uint64_t failed
    uint64_t refused_full
    uint64_t refused_late
    uint64_t dropped_late
    uint64_t in_time
    uint64_t late
    int64_t running
    # when requests came
    int64_t last_arrival_ns         # 0: none yet
    uint64_t gaps_ns
    double gap_squares
    int64_t slot_end_ns             # of the slot that is being counted
    uint64_t slot_arrivals
    uint64_t slots                  # that are over
    double slot_squares
    RunCount *runs                  # owned: by rows, n_runs of them; what is larger counts in the last
    int64_t n_runs
    RunTimes *times                 # owned: by rows, n_times of them; larger sizes have none
    int64_t n_times
    Recording *recording            # owned; NULL: nobody records


# False: out of memory, there is nothing to drop.
cdef bint init_observed(Observed *observed, int64_t max_rows) noexcept nogil
cdef void drop_observed(Observed *observed) noexcept nogil
# Ends the slots that are over.
cdef void close_slots(Observed *observed, int64_t now_ns) noexcept nogil
# A SchedulerObservation but for what is not counted here; of a copy, with the interpreter lock.
cdef dict describe_observed(const Observed *observed)

# Empty, for `size` requests (12 bytes each); NULL: out of memory. The caller's.
cdef Recording *new_recording(int64_t size, int64_t start_ns) noexcept nogil
# NULL is nothing.
cdef void free_recording(Recording *recording) noexcept nogil
cdef void record_arrival(Recording *recording, int64_t rows, int64_t now_ns) noexcept nogil
# (times as int64, rows as int32, how many were lost): native bytes; with the interpreter lock.
cdef tuple describe_recording(const Recording *recording)

cdef inline void count_arrival(Observed *observed, int64_t rows, int64_t now_ns) noexcept nogil:
    cdef int64_t gap_ns = now_ns - observed.last_arrival_ns
    observed.arrivals += 1
    observed.arrived_rows += <uint64_t> rows
    if observed.last_arrival_ns and gap_ns > 0:
        observed.gaps_ns += <uint64_t> gap_ns
        observed.gap_squares += <double> gap_ns * <double> gap_ns
    if gap_ns > 0:
        observed.last_arrival_ns = now_ns
    if now_ns >= observed.slot_end_ns:
        close_slots(observed, now_ns)
    observed.slot_arrivals += 1
    if observed.recording != NULL:
        record_arrival(observed.recording, rows, now_ns)

# An instance was busy for so long with a batch of that many rows.
cdef inline void count_busy(Observed *observed, int64_t rows, int64_t busy_ns) noexcept nogil:
    cdef RunCount *run = &observed.runs[min(rows, observed.n_runs) - 1]
    run.executions += 1
    run.busy_ns += <uint64_t> busy_ns
    run.busy_squares += <double> busy_ns * <double> busy_ns
    if rows <= observed.n_times:
        observed.times[rows - 1].counts[bucket_of(busy_ns) >> 1] += 1
