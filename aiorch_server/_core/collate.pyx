"""Gather, scatter and settle: the batch between a scheduler and a backend."""

from cpython.ref cimport Py_REFCNT
from libc.stdint cimport uint64_t
from libc.stdlib cimport free, realloc

from aiorch_server._core.answers cimport Encoder, count_own_bytes
from aiorch_server._core.counters cimport (
    FAILURE_BACKEND,
    FAILURE_CANCELED,
    PHASE_BATCH_WAIT,
    PHASE_COMPUTE_INPUT,
    PHASE_COMPUTE_OUTPUT,
    PHASE_INFER,
    PHASE_QUEUE,
    PHASE_TOTAL,
    PHASE_WAIT,
    Counters,
    count_failure,
)
from aiorch_server._core.gather cimport Selection, Staging, gather_tensor
from aiorch_server._core.histogram cimport record
from aiorch_server._core.loans cimport return_loans
from aiorch_server._core.observation cimport Observed
from aiorch_server._core.request cimport (
    Stamps,
    fail_request,
    is_cancelled,
    now_ns,
    pthread_mutex_lock,
    pthread_mutex_unlock,
)
from aiorch_server._core.scheduler cimport take_batch
from aiorch_server._core.scheduler_state cimport end_run, release_scheduler, retain_scheduler
from aiorch_server._core.settlement cimport settle_chain
from aiorch_server._core.watch cimport note_slow

from aiorch_server.errors import ModelExecutionError

cdef int CANCELLED = 1
cdef int INTERNAL = 13
cdef int UNAUTHENTICATED = 16   # gRPC's highest code


cdef inline bint precedes_in_memory(const Request *a, const Request *b) noexcept nogil:
    return a.holds != NULL and (b.holds == NULL or a.holds.data < b.holds.data)


cdef class Batch:
    """What ``Scheduler.take`` fills: one per instance, reused; not for two threads at once.

    Between ``take`` and the next ``take`` each member is settled exactly once, by ``settle`` or ``fail``. What is left
    unsettled is failed with INTERNAL, so that nobody waits for ever.
    """

    def __cinit__(self, Scheduler scheduler not None):
        self._scheduler = scheduler
        self._state = scheduler.state
        retain_scheduler(self._state)
        self._staging = [Staging() for _ in range(self._state.spec.n_inputs)]

    def __dealloc__(self):
        if self._state != NULL:
            self.fail_rest()
            pthread_mutex_lock(&self._state.lock)
            end_run(self._state, &self._run)
            pthread_mutex_unlock(&self._state.lock)
            release_scheduler(self._state)
        free(self._members)

    cdef int make_room(self, int64_t members) except -1:
        cdef Request **grown
        if members > self._room:
            grown = <Request **> realloc(self._members, <size_t> members * sizeof(Request *))
            if grown == NULL:
                raise MemoryError
            self._members, self._room = grown, members
        return 0

    def leave(self):
        """Its instance takes nothing more: no forecast counts on it. For whoever dies, while others hold the batch."""
        pthread_mutex_lock(&self._state.lock)
        end_run(self._state, &self._run)
        pthread_mutex_unlock(&self._state.lock)

    @property
    def members(self):
        """Number of selected requests."""
        return self._last - self._first

    @property
    def rows(self):
        """Number of selected rows: the first dimension of gathered inputs of a batching model."""
        return self._rows

    cdef int64_t count_rows(self) noexcept nogil:
        cdef int64_t rows = 0
        for i in range(self._first, self._last):
            if self._members[i] != NULL:
                rows += self._members[i].rows
        return rows

    def _fill(self, Scheduler scheduler not None):
        """The body of ``Scheduler.take``."""
        cdef bint is_taken
        if scheduler is not self._scheduler:
            raise ValueError("a batch belongs to the scheduler it was made for")
        self.make_ready()
        with nogil:
            is_taken = self.pull()
        return is_taken

    cdef object make_ready(self):
        """Before the first ``pull``: nobody of the batch before is left, and the largest has room."""
        self.fail_rest()
        return_loans()
        # each member has a row: there are never more of them, however the cap moves
        self.make_room(max(1, self._state.spec.max_batch_size))

    cdef bint has_members(self) noexcept nogil:
        """Whether any member is not settled yet."""
        for i in range(self._n):
            if self._members[i] != NULL:
                return True
        return False

    cdef bint pull(self) noexcept nogil:
        """Blocks until there is a next batch, False when there will be none; all members are settled."""
        cdef int members = 0
        cdef int64_t rows = 0
        cdef Request *request
        self._n = self._first = self._last = 0
        request = take_batch(self._state, &self._run, &members, &rows, &self._free_since_ns)
        while request != NULL:
            self._members[self._n] = request
            self._n += 1
            request = request.next
        self._last = self._taken = self._n
        self._rows = self._taken_rows = rows
        return self._n > 0

    cdef void sort_members(self) noexcept nogil:
        """By where their tensors lie: rows of one slab are one array then. They are nearly in that order."""
        cdef Request *request
        cdef int at
        for i in range(1, self._n):
            request = self._members[i]
            at = i
            while at > 0 and precedes_in_memory(request, self._members[at - 1]):
                self._members[at] = self._members[at - 1]
                at -= 1
            self._members[at] = request

    def select(self, index=None):
        """Narrows the batch to the member at ``index``, or widens it to all again."""
        if index is None:
            self._first, self._last = 0, self._n
        else:
            if not 0 <= index < self._n:
                raise IndexError(f"member {index} of a batch of {self._n}")
            self._first, self._last = index, index + 1
        self._rows = self.count_rows()

    def gather(self):
        """The inputs of the selected members by name: rows of all members one after the other, in order.

        Small arrays are valid until the next ``gather`` or ``take``; big ones as long as they are held, and that of one
        member may be the message itself: what the model writes into it, another ``gather`` finds. Optional inputs that
        the members leave out are missing.
        """
        cdef Selection selection
        cdef Request *any_member = NULL
        self._gather_ns = now_ns()
        for i in range(self._first, self._last):
            if self._members[i] != NULL:
                any_member = self._members[i]
                break
        selection.members, selection.first, selection.last = self._members, self._first, self._last
        selection.rows, selection.spec = self._rows, self._state.spec
        inputs = {}
        for index in range(self._state.spec.n_inputs if any_member != NULL else 0):
            if any_member.inputs[index].data == NULL:
                continue    # one shape key, so none of the members has it
            tensor = self._scheduler.spec.signature.inputs[index]
            inputs[tensor.name] = gather_tensor(&selection, index, tensor, <Staging> self._staging[index])
        self._run_ns = now_ns()
        return inputs

    def settle(self, outputs not None):
        """Answers the selected members with their rows of ``outputs``.

        ``outputs`` maps every output's name to an array of the signature's dtype; for a batching model the first
        dimension is the number of rows. Raises ModelExecutionError, with nobody settled, where it is not so.
        """
        cdef int64_t run_ended_ns = now_ns()
        # whoever calls this may hold the outputs and write into them
        cdef Encoder encoder = <Encoder> self.check_outputs(outputs, False)
        with nogil:
            encoder.encode()
            self.deliver(True, run_ended_ns)

    def serve(self, execute):
        """Takes batch after batch and answers each with ``execute(inputs)``, until the scheduler is closed and empty.

        The same as ``Scheduler.take``, ``gather`` and ``settle``, but for two things. The interpreter lock is given
        away and taken back once per batch: where other threads are busy, each time costs a switch interval. And big
        outputs that ``execute`` lets go of are sent from where they lie: a dict, and arrays in it that own their memory or
        lie over the batch's inputs, to which no reference is left. Raises what ``execute``, ``gather`` and ``settle``
        raise, with the batch unsettled; its members must be settled before the next call. Holds the outputs of a batch
        until the next one is there.
        """
        cdef Encoder encoder
        cdef int64_t run_ended_ns
        cdef bint is_taken
        self.make_ready()
        with nogil:
            is_taken = self.pull()
        while is_taken:
            inputs = self.gather()
            outputs = execute(inputs)
            run_ended_ns = now_ns()
            del inputs
            encoder = <Encoder> self.check_outputs(outputs, type(outputs) is dict and Py_REFCNT(outputs) == 1)
            with nogil:
                encoder.encode()
                self.deliver(True, run_ended_ns)
                is_taken = self.pull()
            encoder = outputs = None
            return_loans()

    cdef object check_outputs(self, outputs, bint is_ours):
        """Takes hold of the memory of all outputs; ModelExecutionError where they are not what the signature says.

        `is_ours`: nobody else holds the mapping.
        """
        cdef Encoder encoder = Encoder(self._state.spec.n_outputs)
        cdef size_t own_bytes
        cdef uint64_t missing = 0
        encoder.spec, encoder.members, encoder.rows = self._state.spec, self._members, self._rows
        encoder.first, encoder.last, encoder.extra = self._first, self._last, self._extra
        for index, tensor in enumerate(self._scheduler.spec.signature.outputs):
            try:
                array = outputs[tensor.name]
            except KeyError:
                if self._is_detached:   # a model that answers request by request may leave outputs out
                    missing |= <uint64_t> 1 << index
                    continue
                raise ModelExecutionError(
                    f"the model gave no output '{tensor.name}'; it gave {sorted(map(str, outputs))}") from None
            # held by `array` and the mapping, which the model has let go of: nobody will write into it again
            own_bytes = count_own_bytes(array) if is_ours and Py_REFCNT(array) == 2 else 0
            encoder.add(index, tensor, array, own_bytes)
        if missing:
            self._members[0].output_mask &= ~missing
        return encoder

    def fail(self, int code, str text not None):
        """Fails the selected members that are not settled yet with a gRPC code and a text for the client.

        A code that says "ok", or that gRPC does not know, becomes INTERNAL.
        """
        cdef bytes words = text.encode("utf-8", "replace")
        cdef const char *message = words
        cdef int64_t now = now_ns()
        if not 0 < code <= UNAUTHENTICATED:
            code = INTERNAL
        with nogil:
            for i in range(self._first, self._last):
                if self._members[i] != NULL:
                    fail_request(self._members[i], code, message)
            self.deliver(False, now)

    cdef object fail_rest(self):
        if self.has_members():
            self._first, self._last = 0, self._n
            self.fail(INTERNAL, "the executor left this request unanswered")

    cdef void stamp(self, Request *request, int64_t run_ended_ns, int64_t now) noexcept nogil:
        """The doorways of a member, for who asked for them and for the slow ones; each not before the one before."""
        cdef Stamps stamps
        stamps.received_ns, stamps.enqueued_ns, stamps.taken_ns = request.received_ns, request.enqueued_ns, request.taken_ns
        stamps.free_ns = min(max(self._free_since_ns, request.enqueued_ns), request.taken_ns)
        stamps.gather_ns = max(self._gather_ns, stamps.taken_ns)
        stamps.run_ns = max(self._run_ns, stamps.gather_ns)
        stamps.run_ended_ns = max(run_ended_ns, stamps.run_ns)
        stamps.settled_ns = max(now, stamps.run_ended_ns)
        stamps.batch_rows, stamps.batch_members = self._taken_rows, self._taken
        if request.stamps != NULL:
            request.stamps[0] = stamps
        if now - request.received_ns >= self._state.watch.slow_ns:
            note_slow(&self._state.watch, request, &stamps, request.status)

    cdef void deliver(self, bint is_success, int64_t run_ended_ns) noexcept nogil:
        """Counts the selected members and hands them to their sinks; their places become NULL."""
        cdef Request *chain = NULL
        cdef Request *last = NULL
        cdef Request *request
        cdef Counters *counters = &self._state.counters
        cdef int64_t now = now_ns()
        cdef int64_t free_at, size
        cdef int64_t input_ns = self._run_ns - self._gather_ns
        cdef int64_t infer_ns = run_ended_ns - self._run_ns
        cdef int64_t output_ns = now - run_ended_ns
        cdef int64_t answered_rows = 0, n = 0
        for i in range(self._first, self._last):
            request = self._members[i]
            if request == NULL:
                continue
            self._members[i] = NULL
            if is_cancelled(request):   # may become true at any time: looked at once, so that it is counted once
                fail_request(request, CANCELLED, b"cancelled")
                count_failure(&self._state.counters, request, FAILURE_CANCELED, now)
            elif request.status:
                count_failure(&self._state.counters, request, FAILURE_BACKEND, now)
            if request.stamps != NULL or now - request.received_ns >= self._state.watch.slow_ns:
                self.stamp(request, run_ended_ns, now)
            n += 1
            request.next = NULL
            if last == NULL:
                chain = request
            else:
                last.next = request
            last = request
        if is_success and chain != NULL:
            pthread_mutex_lock(&counters.lock)
            request = chain
            while request != NULL:
                if not request.status:
                    free_at = min(max(self._free_since_ns, request.enqueued_ns), request.taken_ns)
                    record(&counters.phases[<int> PHASE_QUEUE], free_at - request.enqueued_ns)
                    record(&counters.phases[<int> PHASE_BATCH_WAIT], request.taken_ns - free_at)
                    record(&counters.phases[<int> PHASE_COMPUTE_INPUT], input_ns)
                    record(&counters.phases[<int> PHASE_INFER], infer_ns)
                    record(&counters.phases[<int> PHASE_COMPUTE_OUTPUT], output_ns)
                    record(&counters.phases[<int> PHASE_TOTAL], now - request.received_ns)
                    record(&counters.phases[<int> PHASE_WAIT], request.taken_ns - request.enqueued_ns)
                    answered_rows += request.rows
                request = request.next
            counters.rows += <unsigned long> answered_rows
            counters.last_inference_ns = now
            if not self._is_detached:
                counters.executions += 1
                size = min(self._rows, counters.n_batch_sizes)
                counters.batch_sizes[size - 1].executions += 1
                counters.batch_sizes[size - 1].input_ns += <unsigned long> input_ns
                counters.batch_sizes[size - 1].infer_ns += <unsigned long> infer_ns
                counters.batch_sizes[size - 1].output_ns += <unsigned long> output_ns
            pthread_mutex_unlock(&counters.lock)
        if not is_success or n < self._taken:
            self._run.is_spoilt = True
        self.observe(chain, n, is_success, now)
        settle_chain(self._state, chain)

    cdef void observe(self, const Request *request, int64_t n, bint is_success, int64_t now) noexcept nogil:
        """Counts a chain of settled requests for who watches the traffic."""
        cdef Observed *observed = &self._state.observed
        cdef int64_t target_ns
        pthread_mutex_lock(&self._state.lock)
        target_ns = self._state.policy.target_ns
        observed.running -= n
        while request != NULL:
            if request.status:
                observed.failed += 1
            else:
                observed.answered += 1
                observed.answered_rows += <unsigned long> request.rows
                if target_ns == 0:
                    pass
                elif now - request.received_ns <= target_ns:
                    observed.in_time += 1
                else:
                    observed.late += 1
            request = request.next
        if is_success and n and not self._is_detached:
            # what form_batch expects of the next run: a slow average, so that one hiccup does not start batches early
            self._state.policy.run_ns += (now - self._gather_ns - self._state.policy.run_ns) // 8
        pthread_mutex_unlock(&self._state.lock)
