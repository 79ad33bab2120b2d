# The queue of one model version: requests sorted into buckets of one shape, in order of urgency within a bucket.
#
# Contract: pure memory; no lock (the scheduler holds one), no clock. All operations are O(log n) in the bucket, finding
# a bucket is linear in the number of shapes that wait now. A bucket lives as long as something waits in it.
# Order: priority level, then urgency_ns (the earlier of the end and arrival + PATIENCE_NS, so that a request without
# end is not overtaken for ever), then arrival.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from aiorch_server._core.request cimport Request
from aiorch_server._core.tenants cimport Tenants

cdef enum:
    PATIENCE_NS = 1000000000
    MAX_VISITED = 1024      # members of a bucket that rows_before looks at


cdef struct Bucket:
    Bucket *next
    uint64_t hash
    const int64_t *key      # the shape key of its members: memory of its first member's copy, owned
    Request **heap          # binary heap by urgency
    Py_ssize_t n
    Py_ssize_t capacity
    Request *oldest         # the same members by arrival
    Request *newest
    int64_t rows
    uint32_t last_level     # no member is, or was, less urgent than these
    int64_t last_urgency_ns


cdef struct Queue:
    Bucket *buckets
    Bucket *spare           # one empty bucket kept, so that a lone client does not allocate on each request
    Tenants *tenants        # owned; NULL until a request of a tenant comes
    int n_key
    Py_ssize_t n
    int64_t n_bytes         # of messages
    uint64_t sequence
    uint64_t formed         # batches so far; see batch_former
    int64_t next_expiry_ns  # a lower bound of the earliest deadline or expiry in the queue; 0: none


cdef void init_queue(Queue *queue, int n_key) noexcept nogil
# Frees the queue's own memory; it must be empty.
cdef void clear_queue(Queue *queue) noexcept nogil
# Puts a bound request with enqueued_ns and end_ns set into its bucket. False: out of memory, nothing happened.
cdef bint push_request(Queue *queue, Request *request) noexcept nogil
# Takes a queued request out, wherever it stands.
cdef void remove_request(Queue *queue, Request *request) noexcept nogil
# Takes out all requests whose deadline_ns or expires_ns has passed; a chain linked by `next`.
cdef Request *remove_expired(Queue *queue, int64_t now_ns) noexcept nogil
# Takes out all requests whose end_ns has passed, but for the last one of the queue, as a chain linked by `next`: by how much
# they are late is their retry_after_ns. `next_ns` is set to the earliest end of the others; 0: none has one.
cdef Request *remove_overdue(Queue *queue, int64_t now_ns, int64_t *next_ns) noexcept nogil
# Takes out everything; a chain linked by `next`.
cdef Request *remove_all(Queue *queue) noexcept nogil

# The bucket of that shape; NULL: nothing of it waits.
cdef const Bucket *bucket_of(const Queue *queue, const int64_t *key) noexcept nogil
# Rows that a newcomer of that level and urgency would not overtake; all of the bucket's where they are too many to count.
cdef int64_t rows_before(const Bucket *bucket, uint32_t level, int64_t urgency_ns) noexcept nogil

cdef inline int64_t urgency_of(const Request *request) noexcept nogil:
    cdef int64_t patient_ns = request.enqueued_ns + PATIENCE_NS
    return request.end_ns if request.end_ns and request.end_ns < patient_ns else patient_ns

# Whether some of the bucket's rows may be overtaken by a newcomer of that level and urgency.
cdef inline bint overtakes(const Bucket *bucket, uint32_t level, int64_t urgency_ns) noexcept nogil:
    return level < bucket.last_level or level == bucket.last_level and urgency_ns < bucket.last_urgency_ns

cdef inline Request *most_urgent(const Bucket *bucket) noexcept nogil:
    return bucket.heap[0]

# True if `a` is to be served before `b`.
cdef inline bint precedes(const Request *a, const Request *b) noexcept nogil:
    if a.level != b.level:
        return a.level < b.level
    if a.urgency_ns != b.urgency_ns:
        return a.urgency_ns < b.urgency_ns
    return a.sequence < b.sequence
