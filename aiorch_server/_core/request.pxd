# The request record, and the way an answer goes back to the thread that owns the connection.
#
# Ownership: a Request belongs to exactly one room at a time.
#   door       allocated by routes.dispatch (or Mailbox.submit), before it can be seen by anybody else
#   queue      from enqueue until an instance takes it, or until cancel_request gives it back to the caller
#   instance   from take until it is settled (answered or failed), each member on its own
#   sink       from settle until the owner thread drains it; the drainer frees it with free_request
# A request that was enqueued comes back exactly once: from cancel_request (returning True) or through its sink.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from aiorch_server._core.loans cimport LentList, Loan
from aiorch_server._core.wire cimport Slice


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)


cdef enum RequestState:
    REQUEST_NEW = 0         # with the door, also after it was cancelled out of a queue
    REQUEST_QUEUED = 1      # in a queue; may be cancelled
    REQUEST_RUNNING = 2     # taken out to be run or failed, and from then on; a cancel only marks it


# Memory outside of the message that slices of a request point into, and what keeps it alive.
cdef struct Hold:
    Hold *next
    const uint8_t *data
    size_t size
    uint8_t *buffer         # a counted buffer (see buffers.pxd) with one reference, or NULL:
    Loan *loan              # ... a loan with one reference


# The doorways behind the queue, CLOCK_MONOTONIC in ns; 0: not reached. free_ns: an instance was free.
cdef struct Stamps:
    int64_t received_ns
    int64_t enqueued_ns
    int64_t free_ns
    int64_t taken_ns
    int64_t gather_ns
    int64_t run_ns
    int64_t run_ended_ns
    int64_t settled_ns
    int64_t batch_rows      # of the batch that it ran in
    int batch_members


# What the W3C header `traceparent` of a request said.
cdef struct TraceParent:
    uint8_t trace_id[16]
    uint8_t span_id[8]
    bint is_present
    bint is_sampled


cdef struct Request:
    # the message: a buffer, owned; all slices point into it, or into what `holds` keeps
    uint8_t *message
    size_t message_size
    Hold *holds             # owned; NULL for most requests
    Slice id
    # tensors in the order of the model's inputs, and the sizes of their dimensions (see spec.bind_request);
    # both arrays lie behind the record in the same allocation
    int n_inputs
    Slice *inputs           # data NULL where an optional input is absent
    int64_t *shape_key
    uint64_t output_mask    # bit i: output i of the model is wanted
    int64_t rows            # batch rows; 1 for a model without batch dimension
    # time, CLOCK_MONOTONIC in ns; 0 means not yet, deadline_ns 0 means none
    int64_t received_ns
    int64_t enqueued_ns
    int64_t taken_ns
    int64_t deadline_ns     # the caller's own deadline (gRPC)
    int64_t expires_ns      # the queue policy's time limit
    int64_t end_ns          # when an answer comes too late: of the deadline and the model's target the earlier; 0: never
    # place in the queue: written by queue.pyx only
    uint32_t level          # twice the priority level, 1 is served first; odd: delayed behind the others of its level
    int64_t urgency_ns      # order within the level
    uint64_t sequence
    Py_ssize_t heap_index
    void *bucket
    Request *older
    Request *newer
    # whose it is, and its place among what waits of its tenant: written by tenants.pyx only, but for the first two
    uint64_t tenant         # 0: nobody's
    double weight           # of the tenant's share; 0 is as 1
    void *line              # NULL: it stands in none
    Request *line_older
    Request *line_newer
    # place among all that arrived and have not left: written by arrivals.pyx only, where answers leave in that order
    Request *sooner
    Request *later
    bint is_settled
    void *scheduler         # SchedulerState that took it, from enqueue until free_request: it holds a reference,
    void (*drop_scheduler)(void *scheduler) noexcept nogil      # ... which this gives back
    RequestState state      # guarded by the scheduler's lock from enqueue on
    bint cancelled          # set by cancel_request while RUNNING: the door drops the answer; see is_cancelled
    # the answer: response is a buffer with 5 leading bytes for the gRPC frame header (already written), response_size
    # counts them, and the pieces in `lent` that belong between (only where the sink takes loans; else NULL).
    # The drainer may steal the pointers by setting them to NULL.
    uint8_t *response
    size_t response_size
    LentList *lent
    int status              # gRPC code; 0: response holds a ModelInferResponse
    char *error             # malloc'd, NUL-terminated UTF-8; NULL if status is 0
    # the way back
    CompletionSink *sink    # holds one reference
    void *owner             # whatever the door wants to find again; NULL once the door lost interest
    Request *next           # link in batch, sink or free list
    # what Python keeps with the request, or NULL: a reference, given back with the record (see mailbox.pyx)
    void *attachment
    void (*drop_attachment)(void *attachment) noexcept nogil
    # the quota that it counts for while this record lives, or NULL: a reference (see quota.pxd)
    void *quota
    void (*leave_quota)(void *quota) noexcept nogil
    int64_t retry_after_ns  # of a refusal: when it makes sense to come back; 0: not known
    # for who watches: NULL, or owned and filled when it is settled; and the trace that it belongs to
    Stamps *stamps
    TraceParent parent


# A list of settled requests of one owner thread, with one wake-up per batch: `wake_fd` is an eventfd that becomes
# readable. Any thread puts, one thread drains. Counted references, so that a request in flight keeps it alive.
cdef struct CompletionSink:
    pthread_mutex_t lock
    Request *head
    Request *tail
    int wake_fd             # owned: closed with the last reference
    bint signalled
    bint takes_loans        # constant: its owner sends answers piece by piece
    bint is_abandoned       # nobody drains any more: what is settled is freed at once
    int references


# A new sink with one reference for the caller, or NULL when memory or descriptors ran out.
cdef CompletionSink *new_sink() noexcept nogil
cdef void retain_sink(CompletionSink *sink) noexcept nogil
cdef void release_sink(CompletionSink *sink) noexcept nogil
# Takes over a chain of settled requests linked by `next`, all of this sink, and wakes the owner once.
cdef void put_settled(CompletionSink *sink, Request *first, Request *last) noexcept nogil
# The owner goes away: frees what waits in the sink, and what will still be put there. The owner must have taken back
# (set to NULL) the `owner` of each of its requests before; it still releases its reference.
cdef void abandon_sink(CompletionSink *sink) noexcept nogil
# Clears the eventfd and gives the chain of settled requests (NULL: none); the caller owns them now.
cdef Request *drain_sink(CompletionSink *sink) noexcept nogil

# A zeroed request with room for `n_inputs` tensors and a shape key of `n_key` numbers, holding a reference to `sink`
# (NULL in simulations); NULL when memory ran out. `message` stays the caller's until success.
cdef Request *new_request(uint8_t *message, size_t size, int n_inputs, int n_key, CompletionSink *sink,
                          void *owner) noexcept nogil
# Keeps memory alive until free_request: adopts the caller's reference to the buffer or to the loan. False: no memory, the
# reference is still the caller's. Before the request can be seen by anybody else.
cdef bint hold_memory(Request *request, const uint8_t *data, size_t size, uint8_t *buffer, Loan *loan) noexcept nogil
# The counted buffer in which a slice of the request lies; NULL: on loan from elsewhere.
cdef uint8_t *find_buffer(const Request *request, const uint8_t *data) noexcept nogil
# Frees the record with its message, response and error, and drops its references.
cdef void free_request(Request *request) noexcept nogil
# Sets status and a copy of the text; a request is failed or answered once, before put_settled.
cdef void fail_request(Request *request, int status, const char *text) noexcept nogil
# The same with Triton's prefix `[request id: X] `, for what is refused before a model saw it.
cdef void refuse_request(Request *request, int status, const char *text) noexcept nogil

cdef int64_t now_ns() noexcept nogil

# What several threads touch without a lock: counts of references, and the flag that the owner's thread raises while an
# instance's thread looks at it.
cdef extern from * nogil:
    """
    static inline int aiorch_add_reference(int *count, int by) { return __atomic_add_fetch(count, by, __ATOMIC_ACQ_REL); }
    static inline void aiorch_raise_flag(int *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }
    static inline int aiorch_is_raised(const int *flag) { return __atomic_load_n(flag, __ATOMIC_RELAXED); }
    """
    int aiorch_add_reference(int *count, int by)
    void aiorch_raise_flag(bint *flag)
    bint aiorch_is_raised(const bint *flag)

cdef inline void mark_cancelled(Request *request) noexcept nogil:
    aiorch_raise_flag(&request.cancelled)

cdef inline bint is_cancelled(const Request *request) noexcept nogil:
    return aiorch_is_raised(&request.cancelled)
