"""Runs the batches of a compiled instance; see compiled.pxd and aiorch_instance.h."""

from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int64_t, uint8_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from aiorch_server._core.answers cimport encode_answer
from aiorch_server._core.buffers cimport COPY_GATHERED, count_copied, drop_buffer, hold_buffer, new_buffer
from aiorch_server._core.collate cimport Batch
from aiorch_server._core.loans cimport LENT_FROM_BYTES, Loan, drop_loan, lend_buffer, may_lend
from aiorch_server._core.request cimport Request, fail_request, find_buffer, is_cancelled, now_ns, pthread_mutex_lock, pthread_mutex_unlock
from aiorch_server._core.spec cimport SpecState, TensorLayout
from aiorch_server._core.wire cimport MAX_TENSORS, Slice
from aiorch_server._core.wire_response cimport OutputView

cdef extern from "<stdlib.h>" nogil:
    void *aligned_alloc(size_t alignment, size_t size)

cdef enum:
    ALIGNMENT = 64
    ERROR_BYTES = 1024
    BIG_BYTES = 65536

cdef int CANCELLED = 1
cdef int RESOURCE_EXHAUSTED = 8


cdef struct Room:           # one input's memory
    uint8_t *data           # small: reused from batch to batch
    size_t capacity
    uint8_t *buffer         # big: of this batch alone, which its answers may share; a reference, or NULL


def serve_compiled(Batch batch not None, instance not None):
    """Pulls batches and runs them on ``instance`` until the scheduler is closed and empty, which gives None.

    Otherwise the text of what failed: the members of that batch are unsettled then, and the caller's to settle before
    the next call. ``instance`` is a capsule as in aiorch_instance.h. Holds the interpreter lock only to come and go.
    """
    cdef const AiorchInstance *target = <const AiorchInstance *> PyCapsule_GetPointer(instance, AIORCH_INSTANCE_CAPSULE)
    cdef Room rooms[MAX_TENSORS]
    cdef char error[ERROR_BYTES]
    cdef bint is_closed
    if target.abi != AIORCH_INSTANCE_ABI:
        raise ValueError(f"a compiled instance of ABI {target.abi}; this server runs {AIORCH_INSTANCE_ABI}")
    batch.make_ready()
    pthread_mutex_lock(&batch._state.lock)
    batch._state.takes_rows = True      # the contract forbids an instance to write there
    pthread_mutex_unlock(&batch._state.lock)
    memset(rooms, 0, sizeof(rooms))
    memset(error, 0, sizeof(error))
    with nogil:
        is_closed = run_batches(batch, target, rooms, error)
        for i in range(<int> MAX_TENSORS):
            free(rooms[i].data)
            drop_buffer(rooms[i].buffer)
    if is_closed:
        return None
    error[<int> ERROR_BYTES - 1] = 0
    return (<bytes> error).decode("utf-8", "replace")


cdef bint run_batches(Batch batch, const AiorchInstance *instance, Room *rooms, char *error) noexcept nogil:
    """True: closed and empty. False: a batch failed, `error` says why, its members are unsettled."""
    cdef AiorchTensor inputs[MAX_TENSORS]
    cdef AiorchTensor outputs[MAX_TENSORS]
    cdef OutputView views[MAX_TENSORS]
    cdef const SpecState *spec = batch._state.spec
    cdef int64_t run_ended_ns
    cdef int index
    while batch.pull():
        if batch._n > 1 and batch._members[0].holds != NULL:
            batch.sort_members()
        batch._gather_ns = now_ns()
        for index in range(spec.n_inputs):
            if gather_input(batch, index, &rooms[index], &inputs[index]) < 0:
                snprintf(error, ERROR_BYTES, b"no memory for an input of %zu bytes", inputs[index].size)
                return False
        batch._run_ns = now_ns()
        memset(outputs, 0, <size_t> spec.n_outputs * sizeof(AiorchTensor))
        error[0] = 0
        if instance.run(instance.model, inputs, outputs, error, ERROR_BYTES) != 0:
            return False
        run_ended_ns = now_ns()
        for index in range(spec.n_outputs):
            if not check_output(batch, index, &outputs[index], &views[index], error):
                return False
        encode_batch(batch, views, inputs, rooms)
        for index in range(spec.n_inputs):
            drop_buffer(rooms[index].buffer)
            rooms[index].buffer = NULL
        batch.deliver(True, run_ended_ns)
    return True


cdef bint is_one_array(Batch batch, int index) noexcept nogil:
    """Whether the members' tensors lie in one buffer, each where the one before ends."""
    cdef const uint8_t *at = batch._members[0].inputs[index].data + batch._members[0].inputs[index].size
    cdef const uint8_t *buffer
    cdef int i
    if batch._n == 1:
        return True
    if batch._members[0].holds == NULL:
        return False
    buffer = find_buffer(batch._members[0], batch._members[0].inputs[index].data)
    if buffer == NULL:
        return False
    for i in range(1, batch._n):
        if (batch._members[i].inputs[index].data != at
                or find_buffer(batch._members[i], at) != buffer):
            return False
        at += batch._members[i].inputs[index].size
    return True


cdef int gather_input(Batch batch, int index, Room *room, AiorchTensor *tensor) noexcept nogil:
    """The members' rows one after the other; -1: no memory, `tensor.size` is what was wanted."""
    cdef const SpecState *spec = batch._state.spec
    cdef const TensorLayout *layout = &spec.inputs[index]
    cdef const Request *first = batch._members[0]
    cdef const Request *member
    cdef int i, at = 0
    cdef size_t k
    cdef uint8_t *out
    # "BOOL": C and C++ behind the model rely on 0 and 1; a client may send any byte
    cdef bint is_bool = layout.itemsize == 1 and layout.datatype.data[0] == c'B'
    tensor.data, tensor.size, tensor.n_dims = NULL, 0, 0
    if first.inputs[index].data == NULL:
        return 0            # one shape key, so none of the members has it
    if spec.max_batch_size > 0:
        tensor.dims[0] = batch._rows
        at = 1
    for i in range(layout.n_dims):
        tensor.dims[at + i] = first.shape_key[layout.key_at + i]
    tensor.n_dims = at + layout.n_dims
    for i in range(batch._n):
        member = batch._members[i]
        tensor.size += member.inputs[index].size
    if not is_bool and (<size_t> first.inputs[index].data) % ALIGNMENT == 0 and is_one_array(batch, index):
        tensor.data = <void *> first.inputs[index].data
        if tensor.size >= BIG_BYTES:
            room.buffer = find_buffer(first, first.inputs[index].data)
            if room.buffer != NULL:
                hold_buffer(room.buffer)
        return 0
    if tensor.size >= BIG_BYTES:
        room.buffer = new_buffer(tensor.size, 0)
        if room.buffer == NULL:
            return -1
    elif tensor.size > room.capacity or room.data == NULL:
        # never shrinks below what was once needed: batches of one model have one order of magnitude
        free(room.data)
        room.capacity = (max(tensor.size, 2 * room.capacity) + ALIGNMENT) // ALIGNMENT * ALIGNMENT
        room.data = <uint8_t *> aligned_alloc(ALIGNMENT, room.capacity)
        if room.data == NULL:
            room.capacity = 0
            return -1
    out = room.buffer if room.buffer != NULL else room.data
    tensor.data = out
    for i in range(batch._n):
        member = batch._members[i]
        memcpy(out, member.inputs[index].data, member.inputs[index].size)
        out += member.inputs[index].size
    count_copied(COPY_GATHERED, tensor.size)
    if is_bool:
        out = <uint8_t *> tensor.data
        for k in range(tensor.size):
            out[k] = out[k] != 0
    return 0


cdef bint check_output(Batch batch, int index, const AiorchTensor *tensor, OutputView *view, char *error) noexcept nogil:
    """Describes the whole batch's output in `view`; False, with the reason, where it is not what it must be."""
    cdef const SpecState *spec = batch._state.spec
    cdef const TensorLayout *layout = &spec.outputs[index]
    cdef int64_t n = layout.itemsize
    cdef int i
    cdef bint is_empty = tensor.n_dims > 0 and tensor.size == 0     # of that a runtime may have no memory at all
    if not 0 <= tensor.n_dims <= AIORCH_MAX_DIMS or (tensor.data == NULL and not is_empty):
        snprintf(error, ERROR_BYTES, b"output '%.*s' is missing, or has more than %d dimensions",
                 <int> layout.name.size, layout.name.data, <int> AIORCH_MAX_DIMS)
        return False
    for i in range(tensor.n_dims):
        if tensor.dims[i] < 0:
            snprintf(error, ERROR_BYTES, b"output '%.*s' has a negative dimension, %lld",
                     <int> layout.name.size, layout.name.data, <long long> tensor.dims[i])
            return False
        view.dims[i] = tensor.dims[i]
        n *= tensor.dims[i]
    if spec.max_batch_size > 0 and (tensor.n_dims == 0 or tensor.dims[0] != batch._rows):
        snprintf(error, ERROR_BYTES, b"output '%.*s' has %lld rows for a batch of %lld",
                 <int> layout.name.size, layout.name.data,
                 <long long> (tensor.dims[0] if tensor.n_dims else 0), <long long> batch._rows)
        return False
    if n < 0 or <size_t> n != tensor.size:
        snprintf(error, ERROR_BYTES, b"output '%.*s' has %zu bytes, its shape says %lld",
                 <int> layout.name.size, layout.name.data, tensor.size, <long long> n)
        return False
    view.head, view.n_dims = layout.head, tensor.n_dims
    view.data.data = <const uint8_t *> tensor.data if tensor.data != NULL else layout.head.data     # never read
    view.data.size = tensor.size
    return True


cdef Loan *find_loan(const Slice *output, const AiorchTensor *inputs, const Room *rooms, int n) noexcept nogil:
    """A loan on the batch's own memory, where the instance gives its input as its output; NULL: the answer is copied."""
    cdef const uint8_t *start
    if output.size < LENT_FROM_BYTES or not may_lend(output.size):
        return NULL
    for i in range(n):
        start = <const uint8_t *> inputs[i].data
        if rooms[i].buffer != NULL and start <= output.data and output.data + output.size <= start + inputs[i].size:
            return lend_buffer(rooms[i].buffer, output.size)
    return NULL


cdef void encode_batch(Batch batch, const OutputView *outputs, const AiorchTensor *inputs,
                       const Room *rooms) noexcept nogil:
    """Writes the answer of each member; what fails to fit fails alone."""
    cdef OutputView views[MAX_TENSORS]
    cdef Loan *loans[MAX_TENSORS]
    cdef Loan *lent[MAX_TENSORS]
    cdef const SpecState *spec = batch._state.spec
    cdef bint is_batched = spec.max_batch_size > 0
    cdef Request *request
    cdef size_t row_bytes
    cdef int64_t at = 0
    cdef int i, k, n
    for k in range(spec.n_outputs):
        loans[k] = find_loan(&outputs[k].data, inputs, rooms, spec.n_inputs)
    for i in range(batch._n):
        request = batch._members[i]
        if is_cancelled(request):
            fail_request(request, CANCELLED, b"cancelled")
            at += request.rows
            continue
        n = 0
        for k in range(spec.n_outputs):
            if not request.output_mask >> k & 1:
                continue
            views[n] = outputs[k]
            if is_batched:
                row_bytes = outputs[k].data.size // <size_t> batch._rows
                views[n].dims[0] = request.rows
                views[n].data.data += <size_t> at * row_bytes
                views[n].data.size = <size_t> request.rows * row_bytes
            lent[n] = loans[k]
            views[n].is_lent = (loans[k] != NULL and request.sink != NULL and request.sink.takes_loans
                                and views[n].data.size >= LENT_FROM_BYTES)
            n += 1
        if encode_answer(spec, request, views, lent, n, batch._extra) < 0:
            fail_request(request, RESOURCE_EXHAUSTED, b"the answer does not fit into memory or into one message")
        at += request.rows
    for k in range(spec.n_outputs):
        if loans[k] != NULL:
            drop_loan(loans[k])
