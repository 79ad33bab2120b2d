"""Slow requests and samples for tracing; see watch.pxd."""

from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from aiorch_server._core.request cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock

from aiorch_server.types import PhaseStamps, SlowRequest

cdef extern from * nogil:
    """
    static inline void aiorch_put_number(int64_t *at, int64_t value) { __atomic_store_n(at, value, __ATOMIC_RELEASE); }
    static inline int64_t aiorch_add_number(int64_t *at, int64_t by) { return __atomic_add_fetch(at, by, __ATOMIC_RELAXED); }
    static inline int64_t aiorch_read_number(const int64_t *at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
    static inline int aiorch_take_one(int64_t *at)
    {
        int64_t there = __atomic_load_n(at, __ATOMIC_RELAXED);
        while (there > 0)
            if (__atomic_compare_exchange_n(at, &there, there - 1, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
                return 1;
        return 0;
    }
    """
    void aiorch_put_number(int64_t *at, int64_t value)
    int64_t aiorch_add_number(int64_t *at, int64_t by)
    int64_t aiorch_read_number(const int64_t *at)
    bint aiorch_take_one(int64_t *at)

cdef extern from "<pthread.h>" nogil:
    int pthread_mutex_trylock(pthread_mutex_t *)

cdef int64_t NEVER = 0x7FFFFFFFFFFFFFFF


cdef void init_watch(Watch *watch) noexcept nogil:
    watch.slow_ns = NEVER
    pthread_mutex_init(&watch.lock, NULL)


cdef void drop_watch(Watch *watch) noexcept nogil:
    free(watch.notes)
    pthread_mutex_destroy(&watch.lock)


cdef bint is_next(Watch *watch) noexcept nogil:
    cdef int64_t every = aiorch_read_number(&watch.every)
    return every > 0 and (every == 1 or aiorch_add_number(&watch.seen, 1) % every == 0)


cdef bint choose(Watch *watch, const TraceParent *parent) noexcept nogil:
    if not watch.is_traced:
        return False
    if parent != NULL and parent.is_present and watch.follows_parents:
        return parent.is_sampled
    if not is_next(watch):
        return False
    aiorch_add_number(&watch.owed, 1)
    return True


cdef bint take_sample(Watch *watch) noexcept nogil:
    return watch.is_traced and (aiorch_take_one(&watch.owed) or is_next(watch))


cdef object set_sampling(Watch *watch, int64_t every, bint follows_parents, bint is_traced):
    if every != watch.every or not is_traced:
        aiorch_put_number(&watch.owed, 0)
        aiorch_put_number(&watch.seen, 0)
    aiorch_put_number(&watch.every, every)
    watch.follows_parents = follows_parents
    watch.is_traced = is_traced


cdef void note_slow(Watch *watch, const Request *request, const Stamps *stamps, int status) noexcept nogil:
    cdef Note *note
    if pthread_mutex_trylock(&watch.lock) != 0:
        return      # somebody reads or writes another: a note is not worth waiting
    if watch.notes != NULL and watch.n_notes < MAX_NOTES:
        note = &watch.notes[watch.n_notes]
        watch.n_notes += 1
        note.id_size = <int> min(request.id.size, <size_t> NOTED_ID_BYTES)
        if note.id_size:
            memcpy(note.id, request.id.data, <size_t> note.id_size)
        note.parent = request.parent
        note.status = status
        note.stamps = stamps[0]
    else:
        watch.n_lost += 1
    pthread_mutex_unlock(&watch.lock)


cdef object watch_slow(Watch *watch, int64_t threshold_ns):
    cdef Note *notes
    if threshold_ns <= 0:
        aiorch_put_number(&watch.slow_ns, NEVER)
        return
    notes = <Note *> calloc(MAX_NOTES, sizeof(Note))
    if notes == NULL:
        raise MemoryError
    pthread_mutex_lock(&watch.lock)
    if watch.notes == NULL:
        watch.notes, notes = notes, NULL
    pthread_mutex_unlock(&watch.lock)
    free(notes)
    aiorch_put_number(&watch.slow_ns, threshold_ns)


cdef object take_notes(Watch *watch):
    cdef Note *copy
    cdef Note *note
    cdef int n
    cdef uint64_t n_lost
    cdef list taken = []
    if watch.notes == NULL or (watch.n_notes == 0 and watch.n_lost == 0):
        return taken, 0
    copy = <Note *> calloc(MAX_NOTES, sizeof(Note))
    if copy == NULL:
        raise MemoryError
    pthread_mutex_lock(&watch.lock)
    n, n_lost = watch.n_notes, watch.n_lost
    memcpy(copy, watch.notes, <size_t> n * sizeof(Note))
    watch.n_notes, watch.n_lost = 0, 0
    pthread_mutex_unlock(&watch.lock)
    try:
        for i in range(n):
            note = &copy[i]
            trace_id = note.parent.trace_id[:16].hex() if note.parent.is_present else ""
            span_id = note.parent.span_id[:8].hex() if note.parent.is_present else ""
            text = note.id[:note.id_size].decode("utf-8", "replace")
            stamps = describe_stamps(&note.stamps, PhaseStamps())
            taken.append(SlowRequest(text, trace_id, span_id, note.status, stamps))
    finally:
        free(copy)
    return taken, n_lost


cdef object describe_stamps(const Stamps *stamps, object target):
    target.received_ns = stamps.received_ns
    target.enqueued_ns = stamps.enqueued_ns
    target.free_ns = stamps.free_ns
    target.taken_ns = stamps.taken_ns
    target.gather_ns = stamps.gather_ns
    target.run_ns = stamps.run_ns
    target.run_ended_ns = stamps.run_ended_ns
    target.settled_ns = stamps.settled_ns
    target.batch_rows = stamps.batch_rows
    target.batch_members = stamps.batch_members
    return target
