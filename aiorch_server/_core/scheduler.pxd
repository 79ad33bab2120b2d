# One model version's scheduler: the queue under one short lock, and the instances that pull from it.
#
# Life: open -> closed (takes nothing new, serves what is queued) -> freed with the last reference. References are held by
# the Python object, by published route tables, and by every request that is queued or running.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint64_t

from aiorch_server._core.batch_former cimport BatchPolicy
from aiorch_server._core.buffers cimport Place
from aiorch_server._core.counters cimport Counters
from aiorch_server._core.queue cimport Queue
from aiorch_server._core.request cimport CompletionSink, Request, pthread_mutex_t
from aiorch_server._core.slabs cimport Slab
from aiorch_server._core.spec cimport ModelSpec, SpecState
from aiorch_server._core.watch cimport Watch


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_cond_t:
        pass


cdef enum:
    MAX_LEVELS = 65536


# What holds for the requests of one priority level.
cdef struct LevelPolicy:
    int64_t expiry_ns       # 0: none
    int64_t max_requests    # 0: none but the queue's own
    bint allows_override    # a request may bring a shorter time
    bint delays             # who waited too long is served after the others of its level, not refused
    int64_t n               # that wait now; counted only where `has_bounded_levels`


cdef struct SchedulerState:
    int references
    pthread_mutex_t lock            # guards everything down to `waiting`; held for a few hundred nanoseconds
    pthread_cond_t due              # instances wait here
    pthread_cond_t idle             # wait_idle waits here
    Queue queue
    BatchPolicy policy
    int64_t in_flight               # queued + running
    int64_t max_requests
    int64_t max_bytes
    LevelPolicy *levels             # owned: n_levels + 1 of them; the first is for where priorities are not used
    bint has_bounded_levels
    bint has_delays                 # some level delays
    uint64_t n_levels               # 0: priorities are not used
    uint64_t default_level
    bint is_closed
    int waiting                     # instances inside take
    bint takes_rows                 # its instances do not write into what they are given
    Slab slab
    bint keeps_order                # answers leave in the order of arrival
    Request *first_arrived          # queued, running or settled, by arrival; only where `keeps_order`
    Request *last_arrived
    bint is_handing_over            # a thread takes answers off that list and gives them to their sinks
    # these guard themselves
    Counters counters
    Watch watch
    # constant
    SpecState *spec                 # holds one reference


cdef enum EnqueueResult:
    ENQUEUED = 0
    REFUSED_FULL = 1
    REFUSED_CLOSED = 2
    REFUSED_LEVEL = 3       # a priority above the configured levels


# Puts a bound request into the queue; priority and timeout as the caller gave them, 0 for none. On ENQUEUED the queue
# owns it; else it is still the caller's. Wakes nobody.
cdef EnqueueResult enqueue(SchedulerState *state, Request *request, uint64_t priority, int64_t timeout_us,
                           int64_t now) noexcept nogil
# Rows of the slab for a tensor that is coming in; see slabs.reserve_rows. False: there are none.
cdef bint reserve_in_slab(SchedulerState *state, size_t row_bytes, int64_t rows, Place *place) noexcept nogil
# Wakes an instance if one waits; called after one or more enqueues.
cdef void wake(SchedulerState *state) noexcept nogil
# True: the request was still queued, has left the queue and is the caller's again (free it with free_request).
# False: it is running or settled; it will come through its sink, and the caller may set `owner` to NULL meanwhile
# (owner is only read and written by the sink's thread).
cdef bint cancel_request(Request *request) noexcept nogil
# Hands a chain of requests, answered or failed and no longer queued, to their sinks, one by one or in runs.
cdef void settle_chain(SchedulerState *state, Request *first) noexcept nogil

cdef void retain_scheduler(SchedulerState *state) noexcept nogil
cdef void release_scheduler(SchedulerState *state) noexcept nogil

# Blocks until a batch is due and gives its members as a chain in order of urgency, RUNNING now; NULL once the scheduler
# is closed and empty. `free_since` is set to when this instance began to wait.
cdef Request *take_batch(SchedulerState *state, int *members, int64_t *rows, int64_t *free_since) noexcept nogil


cdef class Scheduler:
    cdef SchedulerState *state
    cdef readonly ModelSpec spec
