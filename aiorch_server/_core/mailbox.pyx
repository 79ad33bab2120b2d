"""The control plane's way into the queues: submit a canonical message, await the answer on an event loop."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc
from libc.string cimport memcmp, memcpy

from aiorch_server._core.admission cimport (
    ENQUEUED,
    REFUSED_CLOSED,
    REFUSED_FULL,
    REFUSED_LATE,
    REFUSED_LEVEL,
    EnqueueResult,
    cancel_request,
    enqueue,
)
from aiorch_server._core.buffers cimport HeldBuffer, drop_buffer, hold_buffer, hold_for_python, new_buffer
from aiorch_server._core.counters cimport FAILURE_REJECTED, count_failure
from aiorch_server._core.loans cimport Loan, drop_loan, new_loan, return_loans
from aiorch_server._core.request cimport (
    CompletionSink,
    Request,
    Stamps,
    abandon_sink,
    drain_sink,
    free_request,
    hold_memory,
    new_request,
    new_sink,
    now_ns,
    release_sink,
)
from aiorch_server._core.scheduler cimport Scheduler
from aiorch_server._core.scheduler_state cimport wake
from aiorch_server._core.spec cimport bind_request
from aiorch_server._core.watch cimport describe_stamps
from aiorch_server._core.wire cimport Slice
from aiorch_server._core.wire_request cimport SCAN_OK, InferScan, find_tensor, scan_request

from aiorch_server.errors import (
    AnswerTooLate,
    CapacityError,
    InternalError,
    QueueFull,
    RequestError,
    ServerStopping,
    error_from_code,
)


cdef class Mailbox


cdef class Ticket:
    """One submitted request and the future that waits for it."""

    cdef Request *request       # valid until it was drained or taken back; then NULL
    cdef object future
    cdef object stamps
    cdef Mailbox mailbox

    def on_done(self, future):
        """A waiter that gave up takes its request back; one that runs already is dropped when it comes."""
        if self.request != NULL and future.cancelled() and cancel_request(self.request):
            give_up(self.request)
            self.request = NULL
            self.mailbox.outstanding.discard(self)
            Py_DECREF(self)     # the reference that request.owner held


cdef class Mailbox:
    """Submits to schedulers and resolves futures of one event loop; used on that loop's thread only."""

    cdef CompletionSink *sink
    cdef object loop
    cdef set outstanding        # tickets whose request is queued, running or in the sink

    def __cinit__(self, loop not None):
        self.sink = new_sink()
        if self.sink == NULL:
            raise MemoryError("no memory or no descriptor for a mailbox")
        self.outstanding = set()
        self.loop = loop
        loop.add_reader(self.sink.wake_fd, self.collect)

    def __dealloc__(self):
        if self.sink != NULL:
            release_sink(self.sink)

    def close(self):
        """Stops listening to the loop: answers that are there are given, all else fails with ServerStopping now."""
        cdef Ticket ticket
        cdef Request *request
        if self.loop is None:
            return
        self.loop.remove_reader(self.sink.wake_fd)
        self.loop = None
        self.collect()
        for ticket in list(self.outstanding):
            request, ticket.request = ticket.request, NULL
            request.owner = NULL
            if cancel_request(request):
                free_request(request)
            if not ticket.future.done():
                ticket.future.set_exception(ServerStopping("the server is stopping"))
            Py_DECREF(ticket)   # the reference that request.owner held
        self.outstanding.clear()
        abandon_sink(self.sink)
        return_loans()

    def submit(self, Scheduler scheduler not None, bytes message not None, contents=None, *, uint64_t priority=0,
               int64_t timeout_us=0, int64_t deadline_ns=0, object attachment=None,
               object stamps=None, bytes trace=None, uint64_t tenant=0, double weight=1.0):
        """Queues a serialized ModelInferRequest and gives a future of the serialized ModelInferResponse, a memoryview.

        ``contents``, if given, are buffers with the bytes of the inputs, which the message then leaves empty. They are
        not copied but held until the request is settled, however long its caller waits; only BYTES that somebody else
        could write into meanwhile are. ``attachment`` stays with the request until it is settled: ``Member.attachment``.
        ``stamps``, a PhaseStamps, is filled before the future is resolved; ``trace``, the ids of trace and span
        (16 and 8 bytes), is told with a slow request. ``tenant`` is the number of whose it is, 0 for nobody's, and
        ``weight`` that of its share of what waits.
        ``deadline_ns`` is absolute on the monotonic clock, 0 for none. The message must be plain and fit the model
        (InternalError otherwise: the data plane checks before). Raises QueueFull, AnswerTooLate, ServerStopping or
        RequestError when the scheduler refuses. Cancelling the future takes the request out of the queue.
        """
        cdef InferScan scan
        cdef Request *request
        cdef Ticket ticket = Ticket.__new__(Ticket)
        cdef size_t size = <size_t> PyBytes_GET_SIZE(message)
        cdef uint8_t *copy
        cdef int64_t now = now_ns()
        cdef EnqueueResult result
        if self.loop is None:
            raise ServerStopping("the server is stopping")
        copy = new_buffer(size + 1, find_tensor(<const uint8_t *> PyBytes_AS_STRING(message), size, size))
        if copy == NULL:
            raise MemoryError
        memcpy(copy, PyBytes_AS_STRING(message), size)
        if scan_request(copy, size, &scan) != SCAN_OK:
            drop_buffer(copy)
            raise InternalError("the data plane queued a malformed message")
        request = new_request(copy, size, scheduler.spec.state.n_inputs, scheduler.spec.state.n_key, self.sink,
                              <void *> ticket)
        if request == NULL:
            drop_buffer(copy)
            raise MemoryError
        request.received_ns = now
        request.deadline_ns = deadline_ns
        request.tenant, request.weight = tenant, weight
        if attachment is not None:
            Py_INCREF(attachment)
            request.attachment, request.drop_attachment = <void *> attachment, drop_attachment
        if stamps is not None:
            request.stamps = <Stamps *> calloc(1, sizeof(Stamps))
            if request.stamps == NULL:
                give_up(request)
                raise MemoryError
            ticket.stamps = stamps
        if trace is not None and len(trace) == sizeof(request.parent.trace_id) + sizeof(request.parent.span_id):
            memcpy(request.parent.trace_id, PyBytes_AS_STRING(trace), sizeof(request.parent.trace_id))
            memcpy(request.parent.span_id, PyBytes_AS_STRING(trace) + 16, sizeof(request.parent.span_id))
            request.parent.is_present = True
        if contents is not None:
            try:
                hold_contents(request, &scan, contents)
            except BaseException:
                give_up(request)
                raise
        if not bind_request(scheduler.spec.state, &scan, request):
            give_up(request)
            raise InternalError(f"the data plane queued a message that does not fit model '{scheduler.spec.name}'")
        ticket.future = self.loop.create_future()
        ticket.request = request
        ticket.mailbox = self
        with nogil:
            result = enqueue(scheduler.state, request, priority, timeout_us, now)
        if result != ENQUEUED:
            if result != REFUSED_LEVEL:
                count_failure(&scheduler.state.counters, request, FAILURE_REJECTED, now)
            refused = None
            if result == REFUSED_FULL:
                refused = QueueFull("Exceeds maximum queue size", request.retry_after_ns)
            elif result == REFUSED_LATE:
                refused = describe_failure(request, AnswerTooLate)
            give_up(request)
            ticket.request = NULL
            if refused is not None:
                raise refused
            if result == REFUSED_CLOSED:
                raise ServerStopping(
                    "Server is stopping, scheduler for model has stopped accepting new inference requests")
            raise RequestError(
                f"request priority {priority} is above the {scheduler.state.levels.count} priority levels of model "
                f"'{scheduler.spec.name}'")
        # Still on the loop's thread: nobody drains before this returns, so the owner's reference is in time.
        Py_INCREF(ticket)
        self.outstanding.add(ticket)
        ticket.future.add_done_callback(ticket.on_done)
        with nogil:
            wake(scheduler.state)
        return ticket.future

    def collect(self):
        """Resolves what has come back; called by the loop."""
        cdef Request *request
        cdef Request *following
        cdef Ticket ticket
        with nogil:
            request = drain_sink(self.sink)
        while request != NULL:
            following = request.next
            ticket = <Ticket> request.owner
            ticket.request = NULL
            self.outstanding.discard(ticket)
            try:
                if request.stamps != NULL:
                    complete_stamps(request)
                    describe_stamps(request.stamps, ticket.stamps)
                resolve(ticket.future, request)
            except Exception as error:  # MemoryError, most likely; the others in the chain still get their answers
                if not ticket.future.done():
                    ticket.future.set_exception(InternalError(f"the answer was lost: {type(error).__name__}"))
            finally:
                Py_DECREF(ticket)
                free_request(request)
                request = following
        return_loans()  # contents whose owner may be waiting to have them back


cdef void give_up(Request *request):
    """Frees a request that nobody else has; its contents may be waited for."""
    free_request(request)
    return_loans()


cdef object hold_contents(Request *request, InferScan *scan, contents):
    """Lets the inputs lie where ``contents`` are; what is held already goes with the request."""
    if len(contents) != scan.n_inputs:
        raise InternalError(f"{len(contents)} contents for {scan.n_inputs} inputs")
    for i, content in enumerate(contents):
        hold_content(request, &scan.inputs[<int> i].data, is_bytes(&scan.inputs[<int> i].datatype), content)


cdef bint is_bytes(const Slice *datatype) noexcept:
    return datatype.size == 5 and memcmp(datatype.data, b"BYTES", 5) == 0


cdef object hold_content(Request *request, Slice *slice, bint has_elements, content):
    cdef Py_buffer buffer
    cdef uint8_t *counted = NULL
    cdef Loan *loan = NULL
    view = memoryview(content)      # a view of our own: who gave it may release theirs
    owner = view.obj
    PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE)
    slice.data, slice.size = <const uint8_t *> buffer.buf, <size_t> buffer.len
    PyBuffer_Release(&buffer)
    if slice.size == 0:
        slice.data = NULL
        return
    # a model may write into what lies in a counted buffer: what others read too is given as a read-only view
    if type(owner) is HeldBuffer and (has_elements or not view.readonly):
        counted = (<HeldBuffer> owner).buffer
        hold_buffer(counted)
    elif has_elements and type(owner) is not bytes:
        # lengths are checked once and then relied on: a client may change its shared memory in between
        counted = new_buffer(slice.size, 0)
        if counted == NULL:
            raise MemoryError
        memcpy(counted, slice.data, slice.size)
        slice.data = counted
    else:
        loan = new_loan(view, 0)
    if not hold_memory(request, slice.data, slice.size, counted, loan):
        drop_buffer(counted)
        if loan != NULL:
            drop_loan(loan)
        raise MemoryError
    request.message_size += slice.size      # counts for the queue's bound


cdef void complete_stamps(Request *request) noexcept:
    """What never came to an instance has only been received and queued."""
    if request.stamps.settled_ns == 0:
        request.stamps.received_ns, request.stamps.enqueued_ns = request.received_ns, request.enqueued_ns
        request.stamps.settled_ns = now_ns()


cdef void drop_attachment(void *attachment) noexcept with gil:
    Py_DECREF(<object> attachment)


cdef object describe_failure(const Request *request, refusal):
    """The error of a failed request; of the class `refusal` where it says when to come back."""
    text = request.error.decode("utf-8", "replace") if request.error != NULL else "out of memory"
    if request.retry_after_ns:
        return refusal(text, request.retry_after_ns)
    return error_from_code(request.status, text)


cdef object resolve(future, Request *request):
    if future.done():
        return
    if request.status:
        future.set_exception(describe_failure(request, CapacityError))
    else:
        # without the 5 bytes of the gRPC frame header
        future.set_result(memoryview(hold_for_python(
            request.response, request.response + 5, request.response_size - 5)))
