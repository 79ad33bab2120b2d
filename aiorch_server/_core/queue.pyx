"""Requests that wait, by shape and urgency."""

from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

from aiorch_server._core.tenants cimport Line, drop_tenants, join_line, leave_line

cdef enum:
    MAX_OPEN = 128          # a heap of 2**60 members would need 61

cdef extern from * nogil:
    """
    #ifndef AIORCH_DEBUG
    #define AIORCH_DEBUG 0
    #endif
    """
    const int AIORCH_DEBUG      # a debug build checks the whole queue after each change


cdef void require(bint is_true, const char *what) noexcept nogil:
    if not is_true:
        fprintf(stderr, b"aiorch: broken queue: %s\n", what)
        abort()


cdef void check_queue(const Queue *queue) noexcept nogil:
    """Invariants: counts add up, each heap is ordered, each member knows its place, and both orders hold the same."""
    cdef const Bucket *bucket = queue.buckets
    cdef const Request *request
    cdef const Line *line
    cdef Py_ssize_t n = 0, in_lines = 0, linked, index
    cdef int64_t rows
    while bucket != NULL:
        require(bucket.n > 0, b"an empty bucket is listed")
        n += bucket.n
        rows = 0
        for index in range(bucket.n):
            request = bucket.heap[index]
            rows += request.rows
            require(request.heap_index == index and request.bucket == bucket, b"a member does not know its place")
            require(index == 0 or not precedes(request, bucket.heap[(index - 1) // 2]), b"a heap is not ordered")
        require(rows == bucket.rows, b"rows do not add up")
        linked = 0
        request = bucket.oldest
        while request != NULL:
            linked += 1
            require(request.newer != NULL or request == bucket.newest, b"the order of arrival has a loose end")
            request = request.newer
        require(linked == bucket.n, b"the heap and the order of arrival differ")
        bucket = bucket.next
    require(n == queue.n, b"requests do not add up")
    for index in range(queue.tenants.n if queue.tenants != NULL else 0):
        line = queue.tenants.heap[index]
        rows, linked, request = 0, 0, line.newest
        while request != NULL:
            rows, linked = rows + request.rows, linked + 1
            require(request.line == line, b"a request does not know its line")
            request = request.line_older
        require(line.n > 0 and linked == line.n and rows == line.rows, b"a line does not add up")
        require(line.place == index, b"a line does not know its place")
        in_lines += linked
    require(in_lines <= queue.n, b"lines hold what does not wait")


cdef void init_queue(Queue *queue, int n_key) noexcept nogil:
    memset(queue, 0, sizeof(Queue))
    queue.n_key = n_key


cdef void free_bucket(Bucket *bucket) noexcept nogil:
    if bucket != NULL:
        free(<void *> bucket.key)
        free(bucket.heap)
        free(bucket)


cdef void clear_queue(Queue *queue) noexcept nogil:
    free_bucket(queue.spare)
    drop_tenants(queue.tenants)
    queue.spare, queue.tenants = NULL, NULL


cdef uint64_t hash_key(const int64_t *key, int n) noexcept nogil:
    # FNV-1a over whole numbers: mixes enough, because equal hashes are compared number by number
    cdef uint64_t value = 0xCBF29CE484222325ULL
    for i in range(n):
        value = (value ^ <uint64_t> key[i]) * 0x100000001B3ULL
    return value


cdef inline Bucket *look_up(const Queue *queue, const int64_t *key, uint64_t hash) noexcept nogil:
    cdef size_t size = <size_t> queue.n_key * sizeof(int64_t)
    cdef Bucket *bucket = queue.buckets
    while bucket != NULL and (bucket.hash != hash or memcmp(bucket.key, key, size) != 0):
        bucket = bucket.next
    return bucket


cdef const Bucket *bucket_of(const Queue *queue, const int64_t *key) noexcept nogil:
    return look_up(queue, key, hash_key(key, queue.n_key))


cdef Bucket *find_bucket(Queue *queue, const int64_t *key) noexcept nogil:
    cdef uint64_t hash = hash_key(key, queue.n_key)
    cdef size_t size = <size_t> queue.n_key * sizeof(int64_t)
    cdef Bucket *bucket = look_up(queue, key, hash)
    if bucket != NULL:
        return bucket
    if queue.spare != NULL:
        bucket = queue.spare
        queue.spare = NULL
    else:
        bucket = <Bucket *> malloc(sizeof(Bucket))
        if bucket == NULL:
            return NULL
        memset(bucket, 0, sizeof(Bucket))
        bucket.key = <int64_t *> malloc(size if size else 1)
        if bucket.key == NULL:
            free(bucket)
            return NULL
    memcpy(<void *> bucket.key, key, size)
    bucket.hash = hash
    bucket.next = queue.buckets
    queue.buckets = bucket
    return bucket


cdef void retire_bucket(Queue *queue, Bucket *bucket) noexcept nogil:
    cdef Bucket **link = &queue.buckets
    while link[0] != bucket:
        link = &link[0].next
    link[0] = bucket.next
    if queue.spare == NULL:
        queue.spare = bucket
    else:
        free_bucket(bucket)


cdef inline void place(Bucket *bucket, Py_ssize_t index, Request *request) noexcept nogil:
    bucket.heap[index] = request
    request.heap_index = index


cdef void sift_up(Bucket *bucket, Py_ssize_t index) noexcept nogil:
    cdef Request *request = bucket.heap[index]
    cdef Py_ssize_t parent
    while index > 0:
        parent = (index - 1) // 2
        if not precedes(request, bucket.heap[parent]):
            break
        place(bucket, index, bucket.heap[parent])
        index = parent
    place(bucket, index, request)


cdef void sift_down(Bucket *bucket, Py_ssize_t index) noexcept nogil:
    cdef Request *request = bucket.heap[index]
    cdef Py_ssize_t child
    while True:
        child = 2 * index + 1
        if child >= bucket.n:
            break
        if child + 1 < bucket.n and precedes(bucket.heap[child + 1], bucket.heap[child]):
            child += 1
        if not precedes(bucket.heap[child], request):
            break
        place(bucket, index, bucket.heap[child])
        index = child
    place(bucket, index, request)


cdef int64_t earliest_end(const Request *request) noexcept nogil:
    if request.deadline_ns and request.expires_ns:
        return min(request.deadline_ns, request.expires_ns)
    return request.deadline_ns or request.expires_ns


cdef bint push_request(Queue *queue, Request *request) noexcept nogil:
    cdef Bucket *bucket = find_bucket(queue, request.shape_key)
    cdef Request **grown
    cdef Py_ssize_t capacity
    cdef int64_t end
    if bucket == NULL:
        return False
    if bucket.n == bucket.capacity:
        capacity = 2 * bucket.capacity if bucket.capacity else 64
        grown = <Request **> realloc(bucket.heap, <size_t> capacity * sizeof(Request *))
        if grown == NULL:
            if bucket.n == 0:
                retire_bucket(queue, bucket)
            return False
        bucket.heap = grown
        bucket.capacity = capacity
    request.urgency_ns = urgency_of(request)
    if bucket.n == 0 or not overtakes(bucket, request.level, request.urgency_ns):
        bucket.last_level, bucket.last_urgency_ns = request.level, request.urgency_ns
    queue.sequence += 1
    request.sequence = queue.sequence
    request.bucket = bucket
    bucket.n += 1
    bucket.heap[bucket.n - 1] = request
    sift_up(bucket, bucket.n - 1)
    request.newer = NULL
    request.older = bucket.newest
    if bucket.newest != NULL:
        bucket.newest.newer = request
    else:
        bucket.oldest = request
    bucket.newest = request
    bucket.rows += request.rows
    if request.tenant:
        join_line(&queue.tenants, request)
    queue.n += 1
    queue.n_bytes += <int64_t> request.message_size
    end = earliest_end(request)
    if end and (queue.next_expiry_ns == 0 or end < queue.next_expiry_ns):
        queue.next_expiry_ns = end
    if AIORCH_DEBUG:
        check_queue(queue)
    return True


cdef void remove_request(Queue *queue, Request *request) noexcept nogil:
    cdef Bucket *bucket = <Bucket *> request.bucket
    cdef Py_ssize_t index = request.heap_index
    cdef Request *last = bucket.heap[bucket.n - 1]
    bucket.n -= 1
    if last != request:
        place(bucket, index, last)
        sift_up(bucket, index)
        sift_down(bucket, last.heap_index)
    if request.older != NULL:
        request.older.newer = request.newer
    else:
        bucket.oldest = request.newer
    if request.newer != NULL:
        request.newer.older = request.older
    else:
        bucket.newest = request.older
    bucket.rows -= request.rows
    if request.line != NULL:
        leave_line(queue.tenants, request)
    queue.n -= 1
    queue.n_bytes -= <int64_t> request.message_size
    request.older = request.newer = NULL
    request.bucket = NULL
    request.heap_index = -1
    if bucket.n == 0:
        retire_bucket(queue, bucket)
    if queue.n == 0:
        queue.next_expiry_ns = 0
    if AIORCH_DEBUG:
        check_queue(queue)


cdef int64_t rows_before(const Bucket *bucket, uint32_t level, int64_t urgency_ns) noexcept nogil:
    cdef Py_ssize_t open[MAX_OPEN]      # heap indices whose members are not looked at yet
    cdef Py_ssize_t at, child
    cdef const Request *request
    cdef int64_t rows = 0
    cdef int n = 1, visited = 0
    if not overtakes(bucket, level, urgency_ns):
        return bucket.rows
    open[0] = 0
    while n:
        n -= 1
        at = open[n]
        request = bucket.heap[at]
        visited += 1
        if visited > MAX_VISITED or n + 2 > MAX_OPEN:
            return bucket.rows
        if request.level > level or request.level == level and request.urgency_ns > urgency_ns:
            continue                    # and so are all below it
        rows += request.rows
        for child in range(2 * at + 1, min(2 * at + 3, bucket.n)):
            open[n] = child
            n += 1
    return rows


cdef Request *remove_expired(Queue *queue, int64_t now_ns) noexcept nogil:
    cdef Request *chain = NULL
    cdef Request *request
    cdef Request *following
    cdef Bucket *bucket
    cdef Bucket *next_bucket
    cdef int64_t end, earliest = 0
    if queue.next_expiry_ns == 0 or now_ns < queue.next_expiry_ns:
        return NULL
    bucket = queue.buckets
    while bucket != NULL:
        next_bucket = bucket.next
        request = bucket.oldest
        while request != NULL:
            following = request.newer
            end = earliest_end(request)
            if end and end <= now_ns:
                remove_request(queue, request)
                request.next = chain
                chain = request
            elif end and (earliest == 0 or end < earliest):
                earliest = end
            request = following
        bucket = next_bucket
    queue.next_expiry_ns = earliest
    return chain


cdef Request *remove_overdue(Queue *queue, int64_t now_ns, int64_t *next_ns) noexcept nogil:
    cdef Request *chain = NULL
    cdef Request *request
    cdef Request *following
    cdef Bucket *bucket = queue.buckets
    cdef Bucket *next_bucket
    next_ns[0] = 0
    while bucket != NULL:
        next_bucket = bucket.next           # the last member takes its bucket with it
        request = bucket.oldest
        while request != NULL:
            following = request.newer
            if request.end_ns and request.end_ns <= now_ns and queue.n > 1:
                remove_request(queue, request)
                request.retry_after_ns = now_ns - request.end_ns
                request.next = chain
                chain = request
            elif request.end_ns and (next_ns[0] == 0 or request.end_ns < next_ns[0]):
                next_ns[0] = request.end_ns
            request = following
        bucket = next_bucket
    return chain


cdef Request *remove_all(Queue *queue) noexcept nogil:
    cdef Request *chain = NULL
    cdef Request *request
    while queue.buckets != NULL:
        request = queue.buckets.newest
        remove_request(queue, request)
        request.next = chain
        chain = request
    return chain
