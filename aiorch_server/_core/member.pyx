"""Requests out of a batch, one by one: for models that answer each on its own, later, or many times."""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport int64_t, uint8_t

from aiorch_server._core.answers cimport encode_answer
from aiorch_server._core.counters cimport BatchSizeCount, Counters
from aiorch_server._core.request cimport (
    Request,
    fail_request,
    is_cancelled,
    now_ns,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)

cdef int RESOURCE_EXHAUSTED = 8


def detach(Batch batch not None):
    """Takes the selected members out of ``batch``, in order; what is out is no longer the batch's to settle."""
    cdef Member member
    cdef list members = []
    for i in range(batch._first, batch._last):
        if batch._members[i] == NULL:
            continue
        member = Member(batch._scheduler)
        member.make_room(1)
        member.id = batch._members[i].id.data[:batch._members[i].id.size].decode("utf-8", "replace")
        if batch._members[i].attachment != NULL:
            member.attachment = <object> batch._members[i].attachment
        member.received_ns = batch._members[i].received_ns
        member._rows = batch._members[i].rows
        member._free_since_ns = batch._free_since_ns
        member._gather_ns = member._run_ns = now_ns()
        member._members[0] = batch._members[i]
        batch._members[i] = NULL
        member._n = member._last = 1
        member._taken, member._taken_rows = batch._taken, batch._taken_rows
        members.append(member)
    return members


def list_attachments(Batch batch not None):
    """What came from Python with the selected members that are not settled; for the thread that has the batch."""
    return [
        <object> batch._members[i].attachment
        for i in range(batch._first, batch._last)
        if batch._members[i] != NULL and batch._members[i].attachment != NULL
    ]


def read_trace(Batch batch not None):
    """Ids of trace and span, 16 and 8 bytes, of the only selected member; for the thread that has the batch.

    None where it belongs to none, or there are several.
    """
    cdef Request *request = batch._members[batch._first]
    if batch._last - batch._first != 1 or request == NULL or not request.parent.is_present:
        return None
    return request.parent.trace_id[:16] + request.parent.span_id[:8]


def is_unwanted(Batch batch not None):
    """Whether nobody waits for any of the selected members any more; for the thread that has the batch."""
    cdef bint is_anybody = False
    for i in range(batch._first, batch._last):
        if batch._members[i] != NULL:
            is_anybody = True
            if not is_cancelled(batch._members[i]):
                return False
    return is_anybody


def count_run(Batch batch not None, int64_t rows, int64_t input_ns, int64_t infer_ns):
    """Counts one execution of a batch whose members were taken out."""
    cdef Counters *counters = &batch._state.counters
    cdef BatchSizeCount *counted = &counters.batch_sizes[min(max(rows, 1), counters.n_batch_sizes) - 1]
    pthread_mutex_lock(&counters.lock)
    counters.executions += 1
    counted.executions += 1
    counted.input_ns += <unsigned long> input_ns
    counted.infer_ns += <unsigned long> infer_ns
    pthread_mutex_unlock(&counters.lock)
    pthread_mutex_lock(&batch._state.lock)
    batch._state.policy.run_ns += (input_ns + infer_ns - batch._state.policy.run_ns) // 8
    pthread_mutex_unlock(&batch._state.lock)


cdef class Member(Batch):
    """A batch of one request; any thread may settle it, once. Gather before another thread can settle it."""

    def __cinit__(self, scheduler):
        self._is_detached = True

    @property
    def wanted(self):
        """The names of the outputs that the request asks for, in the model's order."""
        if self._is_claimed:
            return ()
        return tuple([
            tensor.name for index, tensor in enumerate(self._scheduler.spec.signature.outputs)
            if self._members[0].output_mask >> index & 1
        ])

    @property
    def is_settled(self):
        """Whether somebody has answered or failed it, or is about to."""
        return self._is_claimed

    @property
    def is_cancelled(self):
        """Whether the caller does not wait for it any more; once it is settled: did not, then."""
        return self._was_cancelled if self._is_claimed else is_cancelled(self._members[0])

    cdef object claim(self):
        if self._is_claimed:
            raise RuntimeError("the request is settled already")
        self._was_cancelled = is_cancelled(self._members[0])
        self._is_claimed = True

    def gather(self):
        """As ``Batch.gather``; the arrays outlive the request. RuntimeError where it is settled already."""
        if self._is_claimed:
            raise RuntimeError("the request is settled already")
        return Batch.gather(self)

    def settle(self, outputs not None, bytes extra not None=b""):
        """Answers with ``outputs``, some or all of the model's by name; those that were not asked for are left out.

        ``extra`` are encoded fields of ModelInferResponse that go with them. Raises ModelExecutionError, with nothing
        settled, where an output is not what the signature says, RuntimeError where it is settled already.
        """
        self.claim()
        try:
            self._fields = extra    # holds the memory
            self._extra.data, self._extra.size = <const uint8_t *> PyBytes_AS_STRING(extra), <size_t> len(extra)
            Batch.settle(self, outputs)
        except BaseException:
            self._is_claimed = False    # not encoded yet, so still ours
            raise

    def finish(self):
        """Settles without outputs: the end of a request whose answers went another way."""
        cdef int64_t ended_ns = now_ns()
        self.claim()
        with nogil:
            if encode_answer(self._state.spec, self._members[0], NULL, NULL, 0, self._extra) < 0:
                fail_request(self._members[0], RESOURCE_EXHAUSTED, b"no memory for an empty answer")
            self.deliver(True, ended_ns)

    def fail(self, int code, str text not None):
        """Fails it as ``Batch.fail`` does; RuntimeError where it is settled already."""
        self.claim()
        try:
            Batch.fail(self, code, text)
        except BaseException:
            self._is_claimed = False    # no memory for the text: it can be tried again, or dropped
            raise
