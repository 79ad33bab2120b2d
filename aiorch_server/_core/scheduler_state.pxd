# One model version's scheduler as all threads see it: the queue under one short lock, what is counted, and its life.
#
# Life: open -> closed (takes nothing new, serves what is queued) -> freed with the last reference. References are held by
# the Python object, by published route tables, and by every request that is queued or running.
# In: admission. To the instances: scheduler. Out: settlement.

from libc.stdint cimport int64_t

from aiorch_server._core.arrivals cimport Arrivals
from aiorch_server._core.batch_former cimport BatchPolicy
from aiorch_server._core.counters cimport Counters
from aiorch_server._core.levels cimport Levels
from aiorch_server._core.observation cimport Observed
from aiorch_server._core.queue cimport Queue
from aiorch_server._core.request cimport aiorch_add_reference, pthread_mutex_t
from aiorch_server._core.slabs cimport Slab
from aiorch_server._core.spec cimport SpecState
from aiorch_server._core.watch cimport Watch


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_cond_t:
        pass
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_broadcast(pthread_cond_t *)


# An instance's batch under way: memory of its Batch, listed between take and the next take.
cdef struct Run:
    Run *next
    Run *previous
    int64_t taken_ns
    int64_t rows                    # 0: it is not listed
    bint is_spoilt                  # failed, or run again in parts: its time says nothing


cdef struct SchedulerState:
    int references
    pthread_mutex_t lock            # guards everything down to `arrivals`; held for a few hundred nanoseconds
    pthread_cond_t due              # instances wait here
    pthread_cond_t idle             # who waits for the end of all requests waits here
    Queue queue
    BatchPolicy policy
    int64_t in_flight               # queued + running
    int64_t max_requests
    int64_t max_bytes
    Levels levels
    bint is_closed
    int waiting                     # instances inside take
    int retiring                    # instances that shall leave: the next ones that come to take
    Run *runs
    int n_runs
    bint takes_rows                 # its instances do not write into what they are given
    Slab slab
    bint keeps_order                # constant: answers leave in the order of arrival
    Arrivals arrivals               # used only then
    Observed observed
    int64_t sweep_ns                # when the sweeper should look into the queue, a lower bound; 0: it need not
    int64_t swept_ns                # when it did last
    # these guard themselves
    Counters counters
    Watch watch
    SchedulerState *next_swept      # guarded by the sweeper's lock
    # constant
    SpecState *spec                 # holds one reference


# Open, with one reference for the caller and without bounds: those, `policy`, `levels` and `keeps_order` are the caller's
# to set before anybody else sees it. NULL: out of memory.
cdef SchedulerState *new_scheduler(SpecState *spec) noexcept nogil
# Frees what nobody refers to any more; for release_scheduler.
cdef void free_scheduler(SchedulerState *state) noexcept nogil
# Lists the run of a batch that was just taken; under the lock, as the others.
cdef void begin_run(SchedulerState *state, Run *run, int64_t rows, int64_t now) noexcept nogil
# Its instance is free again, or gone. Nothing where it is not listed.
cdef void end_run(SchedulerState *state, Run *run) noexcept nogil
# When each instance will be free, into room for MAX_FORETOLD; how many there are.
cdef int list_free(const SchedulerState *state, int64_t *free_ns, int64_t now) noexcept nogil
# Wakes an instance if one waits; called after one or more requests came.
cdef void wake(SchedulerState *state) noexcept nogil
# Takes nothing new; instances that wait are told.
cdef void close_scheduler(SchedulerState *state) noexcept nogil
# A condition that goes by the monotonic clock.
cdef void init_condition(pthread_cond_t *condition) noexcept nogil
# Gives the lock away until the condition is signalled or the clock says `at_ns` (0: never); may return early.
cdef void wait_until(pthread_cond_t *condition, pthread_mutex_t *lock, int64_t at_ns) noexcept nogil

cdef inline void retain_scheduler(SchedulerState *state) noexcept nogil:
    aiorch_add_reference(&state.references, 1)

cdef inline void release_scheduler(SchedulerState *state) noexcept nogil:
    if aiorch_add_reference(&state.references, -1) == 0:
        free_scheduler(state)
