"""The life of a scheduler, and how instances sleep and are woken; see scheduler_state.pxd."""

from libc.stdint cimport uint8_t
from libc.stdlib cimport calloc, free

from aiorch_server._core.batch_former cimport expected_run
from aiorch_server._core.buffers cimport drop_buffer
from aiorch_server._core.counters cimport drop_counters, init_counters
from aiorch_server._core.forecast cimport MAX_FORETOLD
from aiorch_server._core.levels cimport free_levels
from aiorch_server._core.observation cimport drop_observed, init_observed
from aiorch_server._core.queue cimport clear_queue, init_queue
from aiorch_server._core.request cimport (
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from aiorch_server._core.slabs cimport empty_slab
from aiorch_server._core.spec cimport release_spec, retain_spec
from aiorch_server._core.watch cimport drop_watch, init_watch

cdef extern from "<time.h>" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    ctypedef int clockid_t
    clockid_t CLOCK_MONOTONIC

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_condattr_t:
        pass
    int pthread_condattr_init(pthread_condattr_t *)
    int pthread_condattr_setclock(pthread_condattr_t *, clockid_t)
    int pthread_condattr_destroy(pthread_condattr_t *)
    int pthread_cond_init(pthread_cond_t *, pthread_condattr_t *)
    int pthread_cond_destroy(pthread_cond_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_timedwait(pthread_cond_t *, pthread_mutex_t *, const timespec *)


cdef void init_condition(pthread_cond_t *condition) noexcept nogil:
    cdef pthread_condattr_t attributes
    pthread_condattr_init(&attributes)
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
    pthread_cond_init(condition, &attributes)
    pthread_condattr_destroy(&attributes)


cdef SchedulerState *new_scheduler(SpecState *spec) noexcept nogil:
    cdef SchedulerState *state = <SchedulerState *> calloc(1, sizeof(SchedulerState))
    if state == NULL:
        return NULL
    if not init_counters(&state.counters, spec.max_batch_size):
        free(state)
        return NULL
    if not init_observed(&state.observed, spec.max_batch_size):
        drop_counters(&state.counters)
        free(state)
        return NULL
    pthread_mutex_init(&state.lock, NULL)
    init_watch(&state.watch)
    init_condition(&state.due)
    init_condition(&state.idle)
    init_queue(&state.queue, spec.n_shared)
    state.references = 1
    state.spec = spec
    retain_spec(spec)
    return state


cdef void free_scheduler(SchedulerState *state) noexcept nogil:
    clear_queue(&state.queue)
    drop_buffer(empty_slab(&state.slab))
    pthread_cond_destroy(&state.due)
    pthread_cond_destroy(&state.idle)
    pthread_mutex_destroy(&state.lock)
    drop_watch(&state.watch)
    release_spec(state.spec)
    free_levels(&state.levels)
    drop_counters(&state.counters)
    drop_observed(&state.observed)
    free(state)


cdef void wait_until(pthread_cond_t *condition, pthread_mutex_t *lock, int64_t at_ns) noexcept nogil:
    cdef timespec at
    if at_ns == 0:
        pthread_cond_wait(condition, lock)
        return
    at.tv_sec = at_ns // 1000000000
    at.tv_nsec = at_ns % 1000000000
    pthread_cond_timedwait(condition, lock, &at)


cdef void begin_run(SchedulerState *state, Run *run, int64_t rows, int64_t now) noexcept nogil:
    run.taken_ns, run.rows, run.is_spoilt = now, rows, False
    run.previous, run.next = NULL, state.runs
    if state.runs != NULL:
        state.runs.previous = run
    state.runs = run
    state.n_runs += 1


cdef void end_run(SchedulerState *state, Run *run) noexcept nogil:
    if run.rows == 0:
        return
    if run.previous != NULL:
        run.previous.next = run.next
    else:
        state.runs = run.next
    if run.next != NULL:
        run.next.previous = run.previous
    run.rows = 0
    state.n_runs -= 1


cdef int list_free(const SchedulerState *state, int64_t *free_ns, int64_t now) noexcept nogil:
    cdef const Run *run = state.runs
    cdef int64_t end_ns
    cdef int n = 0
    cdef int instances = min(max(1, state.policy.instances or state.waiting + state.n_runs), <int> MAX_FORETOLD)
    while run != NULL and n < instances:
        end_ns = run.taken_ns + expected_run(&state.policy, run.rows)
        # what takes longer than it should has, for all one knows, as long again to go
        free_ns[n] = end_ns if end_ns > now else now + (now - end_ns)
        n += 1
        run = run.next
    while n < instances:
        free_ns[n] = now
        n += 1
    return n


cdef void wake(SchedulerState *state) noexcept nogil:
    cdef bint is_awaited
    pthread_mutex_lock(&state.lock)
    is_awaited = state.waiting > 0
    pthread_mutex_unlock(&state.lock)
    if is_awaited:
        pthread_cond_signal(&state.due)


cdef void close_scheduler(SchedulerState *state) noexcept nogil:
    cdef uint8_t *dropped
    pthread_mutex_lock(&state.lock)
    state.is_closed = True
    state.policy.delay_ns = 0       # nobody can come any more for whom it would be worth waiting
    dropped = empty_slab(&state.slab)
    pthread_cond_broadcast(&state.due)
    pthread_mutex_unlock(&state.lock)
    drop_buffer(dropped)
