"""Counts of traffic and run times, and their description for Python; see observation.pxd."""

from libc.stdint cimport INT32_MAX
from libc.stdlib cimport calloc, free, malloc

from aiorch_server._core.histogram cimport lower_bound

from aiorch_server.types import RunObservation

cdef enum:
    MAX_RUN_SIZES = 4096


cdef bint init_observed(Observed *observed, int64_t max_rows) noexcept nogil:
    observed.n_runs = max(1, min(max_rows, MAX_RUN_SIZES))
    observed.runs = <RunCount *> calloc(<size_t> observed.n_runs, sizeof(RunCount))
    observed.n_times = min(observed.n_runs, <int64_t> MAX_TIMED_SIZES)
    observed.times = <RunTimes *> calloc(<size_t> observed.n_times, sizeof(RunTimes))
    if observed.runs == NULL or observed.times == NULL:
        drop_observed(observed)
        return False
    return True


cdef void drop_observed(Observed *observed) noexcept nogil:
    free(observed.runs)
    free(observed.times)
    free_recording(observed.recording)
    observed.runs, observed.times, observed.recording = NULL, NULL, NULL


cdef Recording *new_recording(int64_t size, int64_t start_ns) noexcept nogil:
    cdef Recording *recording = <Recording *> calloc(1, sizeof(Recording))
    if recording == NULL:
        return NULL
    recording.start_ns, recording.size = start_ns, size
    recording.times_ns = <int64_t *> malloc(<size_t> size * sizeof(int64_t))
    recording.rows = <int32_t *> malloc(<size_t> size * sizeof(int32_t))
    if recording.times_ns == NULL or recording.rows == NULL:
        free_recording(recording)
        return NULL
    return recording


cdef void free_recording(Recording *recording) noexcept nogil:
    if recording != NULL:
        free(recording.times_ns)
        free(recording.rows)
        free(recording)


cdef void record_arrival(Recording *recording, int64_t rows, int64_t now_ns) noexcept nogil:
    if recording.n == recording.size:
        recording.lost += 1
        return
    recording.last_ns = max(recording.last_ns, now_ns - recording.start_ns)
    recording.times_ns[recording.n] = recording.last_ns
    recording.rows[recording.n] = <int32_t> min(rows, <int64_t> INT32_MAX)
    recording.n += 1


cdef tuple describe_recording(const Recording *recording):
    return (
        (<const char *> recording.times_ns)[:recording.n * <int64_t> sizeof(int64_t)],
        (<const char *> recording.rows)[:recording.n * <int64_t> sizeof(int32_t)],
        recording.lost,
    )


cdef void close_slots(Observed *observed, int64_t now_ns) noexcept nogil:
    if now_ns < observed.slot_end_ns:
        return
    if observed.slot_end_ns:        # else nothing has come yet
        observed.slots += <uint64_t> (1 + (now_ns - observed.slot_end_ns) // SLOT_NS)
        observed.slot_squares += <double> observed.slot_arrivals * <double> observed.slot_arrivals
        observed.slot_arrivals = 0
    observed.slot_end_ns = now_ns - now_ns % SLOT_NS + SLOT_NS


cdef dict describe_times(const RunTimes *times):
    return {
        lower_bound(min(2 * i + 2, N_BUCKETS - 1)): times.counts[i]
        for i in range(N_TIMES)
        if times.counts[i]
    }


cdef dict describe_observed(const Observed *observed):
    return {
        "arrivals": observed.arrivals,
        "arrived_rows": observed.arrived_rows,
        "answered": observed.answered,
        "answered_rows": observed.answered_rows,
        "failed": observed.failed,
        "refused_full": observed.refused_full,
        "refused_late": observed.refused_late,
        "dropped_late": observed.dropped_late,
        "in_time": observed.in_time,
        "late": observed.late,
        "running": observed.running,
        "gaps_ns": observed.gaps_ns,
        "gap_squares": observed.gap_squares,
        "slots": observed.slots,
        "slot_squares": observed.slot_squares,
        "runs": tuple([
            RunObservation(
                i + 1, observed.runs[i].executions, observed.runs[i].busy_ns, observed.runs[i].busy_squares,
                describe_times(&observed.times[i]) if i < observed.n_times else {})
            for i in range(observed.n_runs)
            if observed.runs[i].executions
        ]),
    }
