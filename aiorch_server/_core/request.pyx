"""The request record and the completion sink; see request.pxd for who owns what when."""

from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, strlen

from aiorch_server._core.buffers cimport drop_buffer
from aiorch_server._core.loans cimport drop_lent_list, drop_loan

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int initial, int flags)
    int EFD_NONBLOCK
    int EFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    Py_ssize_t read(int fd, void *buffer, size_t size)
    Py_ssize_t write(int fd, const void *buffer, size_t size)
    int close(int fd)

cdef extern from "<time.h>" nogil:
    ctypedef int clockid_t
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(clockid_t clock, timespec *at)
    clockid_t CLOCK_MONOTONIC


cdef int64_t now_ns() noexcept nogil:
    cdef timespec at
    clock_gettime(CLOCK_MONOTONIC, &at)
    return <int64_t> at.tv_sec * 1000000000 + at.tv_nsec


cdef CompletionSink *new_sink() noexcept nogil:
    cdef CompletionSink *sink = <CompletionSink *> calloc(1, sizeof(CompletionSink))
    if sink == NULL:
        return NULL
    sink.wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    if sink.wake_fd < 0:
        free(sink)
        return NULL
    pthread_mutex_init(&sink.lock, NULL)
    sink.references = 1
    return sink


cdef void retain_sink(CompletionSink *sink) noexcept nogil:
    aiorch_add_reference(&sink.references, 1)


cdef void release_sink(CompletionSink *sink) noexcept nogil:
    if aiorch_add_reference(&sink.references, -1) > 0:
        return
    # Nobody drains any more. Each request in the list held a reference, so the list can only be empty here.
    close(sink.wake_fd)
    pthread_mutex_destroy(&sink.lock)
    free(sink)


cdef void put_settled(CompletionSink *sink, Request *first, Request *last) noexcept nogil:
    cdef bint must_wake = False
    cdef bint is_abandoned
    cdef uint64_t one = 1
    # The chain's own references go away as soon as the owner drains it, which may be before this returns.
    retain_sink(sink)
    last.next = NULL
    pthread_mutex_lock(&sink.lock)
    is_abandoned = sink.is_abandoned
    if not is_abandoned:
        if sink.tail == NULL:
            sink.head = first
        else:
            sink.tail.next = first
        sink.tail = last
        must_wake = not sink.signalled
        sink.signalled = True
    pthread_mutex_unlock(&sink.lock)
    if is_abandoned:
        free_chain(first)
    elif must_wake:
        write(sink.wake_fd, &one, sizeof(one))
    release_sink(sink)


cdef void free_chain(Request *request) noexcept nogil:
    cdef Request *following
    while request != NULL:
        following = request.next
        free_request(request)
        request = following


cdef void abandon_sink(CompletionSink *sink) noexcept nogil:
    cdef Request *chain
    retain_sink(sink)       # the requests may hold the last references
    pthread_mutex_lock(&sink.lock)
    sink.is_abandoned = True
    chain = sink.head
    sink.head = sink.tail = NULL
    pthread_mutex_unlock(&sink.lock)
    free_chain(chain)
    release_sink(sink)


cdef Request *drain_sink(CompletionSink *sink) noexcept nogil:
    cdef Request *chain
    cdef uint64_t count
    pthread_mutex_lock(&sink.lock)
    # Inside the lock and in any case: who raised the flag may write after this, and that wake-up finds nothing, once.
    read(sink.wake_fd, &count, sizeof(count))
    sink.signalled = False
    chain = sink.head
    sink.head = sink.tail = NULL
    pthread_mutex_unlock(&sink.lock)
    return chain


cdef Request *new_request(uint8_t *message, size_t size, int n_inputs, int n_key, CompletionSink *sink,
                          void *owner) noexcept nogil:
    cdef Request *request = <Request *> calloc(
        1, sizeof(Request) + <size_t> n_inputs * sizeof(Slice) + <size_t> n_key * sizeof(int64_t))
    if request == NULL:
        return NULL
    request.message = message
    request.message_size = size
    request.n_inputs = n_inputs
    request.inputs = <Slice *> (request + 1)
    request.shape_key = <int64_t *> (request.inputs + n_inputs)
    request.heap_index = -1
    request.state = REQUEST_NEW
    request.sink = sink
    if sink != NULL:
        retain_sink(sink)
    request.owner = owner
    return request


cdef bint hold_memory(Request *request, const uint8_t *data, size_t size, uint8_t *buffer, Loan *loan) noexcept nogil:
    cdef Hold *hold = <Hold *> malloc(sizeof(Hold))
    if hold == NULL:
        return False
    hold.next, hold.data, hold.size, hold.buffer, hold.loan = request.holds, data, size, buffer, loan
    request.holds = hold
    return True


cdef uint8_t *find_buffer(const Request *request, const uint8_t *data) noexcept nogil:
    cdef const Hold *hold = request.holds
    while hold != NULL:
        if hold.data <= data < hold.data + hold.size:
            return <uint8_t *> hold.buffer
        hold = hold.next
    return <uint8_t *> request.message


cdef void free_holds(Request *request) noexcept nogil:
    cdef Hold *hold
    while request.holds != NULL:
        hold = request.holds
        request.holds = hold.next
        drop_buffer(hold.buffer)
        if hold.loan != NULL:
            drop_loan(hold.loan)
        free(hold)


cdef void free_request(Request *request) noexcept nogil:
    if request.holds != NULL:
        free_holds(request)
    drop_buffer(request.message)
    drop_buffer(request.response)
    drop_lent_list(request.lent)
    free(request.error)
    if request.stamps != NULL:
        free(request.stamps)
    if request.attachment != NULL:
        request.drop_attachment(request.attachment)
    if request.quota != NULL:
        request.leave_quota(request.quota)
    if request.scheduler != NULL:
        request.drop_scheduler(request.scheduler)
    if request.sink != NULL:
        release_sink(request.sink)
    free(request)


cdef void fail_request(Request *request, int status, const char *text) noexcept nogil:
    cdef size_t size = strlen(text)
    drop_buffer(request.response)
    drop_lent_list(request.lent)
    request.response, request.lent = NULL, NULL
    request.response_size = 0
    request.status = status
    free(request.error)
    request.error = <char *> malloc(size + 1)
    if request.error != NULL:
        memcpy(request.error, text, size + 1)


cdef void refuse_request(Request *request, int status, const char *text) noexcept nogil:
    cdef char buffer[512]
    cdef int id_size = <int> request.id.size if request.id.size < 256 else 256
    if id_size:
        snprintf(buffer, sizeof(buffer), "[request id: %.*s] %s", id_size, <const char *> request.id.data, text)
    else:
        snprintf(buffer, sizeof(buffer), "[request id: <id_unknown>] %s", text)
    fail_request(request, status, buffer)
