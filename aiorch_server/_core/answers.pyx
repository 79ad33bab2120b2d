"""Answers from the outputs of a batch; see answers.pxd for the contract."""

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.ref cimport Py_REFCNT
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from aiorch_server._core.buffers cimport COPY_ENCODED, HeldBuffer, count_copied, new_buffer
from aiorch_server._core.loans cimport (
    LENT_FROM_BYTES,
    Lent,
    LentList,
    drop_lent_list,
    drop_loan,
    hold_loan,
    may_lend,
    new_lent_list,
    new_loan,
)
from aiorch_server._core.request cimport fail_request, is_cancelled
from aiorch_server._core.spec cimport TensorLayout
from aiorch_server._core.wire cimport MAX_DIMS, MAX_TENSORS
from aiorch_server._core.wire_response cimport find_output, response_size, write_response

import numpy as np

from aiorch_server.errors import ModelExecutionError

cdef int CANCELLED = 1
cdef int RESOURCE_EXHAUSTED = 8
cdef size_t BIG_BYTES = 65536
cdef size_t MAX_ANSWER_BYTES = 0xFFFFFFFF   # the length in the gRPC frame header has 32 bits


cdef int encode_answer(const SpecState *spec, Request *request, OutputView *views, Loan **loans, int n,
                       Slice extra) noexcept nogil:
    """Writes the answer with its 5-byte gRPC frame header, without what is lent; -1 when memory ran out."""
    cdef size_t size = response_size(&spec.response_head, &request.id, views, n) + extra.size
    cdef LentList *lent = NULL
    cdef Lent *piece
    cdef uint8_t *out
    cdef size_t own_size
    cdef size_t align_at = 0
    cdef int n_lent = 0
    if size > MAX_ANSWER_BYTES:
        return -1
    for k in range(n):
        n_lent += views[k].is_lent
    if n_lent:
        lent = new_lent_list(n_lent)
        if lent == NULL:
            return -1
        for k in range(n):
            if views[k].is_lent:
                lent.size += views[k].data.size
    elif size >= BIG_BYTES and request.sink != NULL and not request.sink.takes_loans:
        # it stays in this process and may be the next model's input
        align_at = 5 + find_output(&spec.response_head, &request.id, views, n)
    own_size = size - (lent.size if lent != NULL else 0)
    out = new_buffer(5 + own_size, align_at)
    if out == NULL:
        drop_lent_list(lent)
        return -1
    out[0] = 0      # not compressed; then the length, big-endian
    out[1] = <uint8_t> (size >> 24)
    out[2] = <uint8_t> (size >> 16)
    out[3] = <uint8_t> (size >> 8)
    out[4] = <uint8_t> size
    write_response(out + 5, &spec.response_head, &request.id, views, n)
    if extra.size:
        memcpy(out + 5 + own_size - extra.size, extra.data, extra.size)
    for k in range(n):
        if not views[k].is_lent:
            count_copied(COPY_ENCODED, views[k].data.size)
            continue
        piece = &lent.items[lent.n]
        piece.at, piece.data, piece.size = 5 + views[k].gap_at, views[k].data.data, views[k].data.size
        piece.loan = loans[k]
        hold_loan(piece.loan)
        lent.n += 1
    request.response, request.response_size, request.lent = out, size + 5, lent
    return 0


cdef size_t count_own_bytes(array):
    """The memory that goes with ``array``, of which it may be a part; 0: another array, model or framework has it too."""
    if type(array) is not np.ndarray:
        return 0
    base = array.base
    while type(base) is np.ndarray and Py_REFCNT(base) == 2:
        array, base = base, base.base
    if base is None:
        return array.nbytes if array.flags.owndata else 0
    return (<HeldBuffer> base).size if type(base) is HeldBuffer and Py_REFCNT(base) == 2 else 0


cdef class Encoder:
    """Holds the outputs of a batch while each member's answer is written; releases the buffers when it goes."""

    def __cinit__(self, int n):
        self.n = n
        self.kept = []
        self.buffers = <Py_buffer *> calloc(<size_t> n + 1, sizeof(Py_buffer))
        self.views = <OutputView *> calloc(<size_t> n + 1, sizeof(OutputView))
        self.row_bytes = <size_t *> calloc(<size_t> n + 1, sizeof(size_t))
        self.is_held = <bint *> calloc(<size_t> n + 1, sizeof(bint))
        self.parts = <Slice **> calloc(<size_t> n + 1, sizeof(Slice *))
        self.loans = <Loan **> calloc(<size_t> n + 1, sizeof(Loan *))
        if (self.loans == NULL or self.buffers == NULL or self.views == NULL or self.row_bytes == NULL
                or self.is_held == NULL or self.parts == NULL):
            raise MemoryError

    def __dealloc__(self):
        for i in range(self.n):
            if self.is_held != NULL and self.is_held[i]:
                PyBuffer_Release(&self.buffers[i])
            if self.loans != NULL and self.loans[i] != NULL:
                drop_loan(self.loans[i])
            if self.parts != NULL:
                free(self.parts[i])
        free(self.loans)
        free(self.parts)
        free(self.buffers)
        free(self.views)
        free(self.row_bytes)
        free(self.is_held)

    cdef object add(self, int index, tensor, given, size_t own_bytes):
        """Checks one output and takes hold of its memory; `own_bytes`: see count_own_bytes."""
        cdef const SpecState *spec = self.spec
        cdef const TensorLayout *layout = &spec.outputs[index]
        cdef OutputView *view = &self.views[index]
        array = np.asarray(given)
        if spec.max_batch_size > 0 and (array.ndim == 0 or array.shape[0] != self.rows):
            raise ModelExecutionError(
                f"output '{tensor.name}' has shape {list(array.shape)} for a batch of {self.rows} rows; "
                f"its first dimension must be {self.rows}")
        if array.ndim > MAX_DIMS:
            raise ModelExecutionError(f"output '{tensor.name}' has {array.ndim} dimensions; at most {MAX_DIMS} work")
        view.head = layout.head
        view.n_dims = array.ndim
        for i in range(view.n_dims):
            view.dims[i] = array.shape[i]
        if layout.itemsize == 0:
            if array.dtype.kind not in "OSU":
                raise ModelExecutionError(f"output '{tensor.name}' has numpy type {array.dtype}; BYTES needs object")
            self.encode_bytes(index, array, spec.max_batch_size > 0)
            return
        if array.dtype != tensor.datatype.numpy:
            raise ModelExecutionError(
                f"output '{tensor.name}' has numpy type {array.dtype}; {tensor.datatype.value} needs "
                f"{tensor.datatype.numpy}")
        if not array.flags.c_contiguous:
            # a broadcast array can be larger than all memory: not copied where no message could carry it
            if array.nbytes > (self.last - self.first) * MAX_ANSWER_BYTES:
                raise ModelExecutionError(
                    f"output '{tensor.name}' has {array.nbytes} bytes; an answer holds at most {MAX_ANSWER_BYTES}")
            array = np.ascontiguousarray(array)
        PyObject_GetBuffer(array, &self.buffers[index], PyBUF_C_CONTIGUOUS)
        self.is_held[index] = True
        view.data.data = <const uint8_t *> self.buffers[index].buf
        view.data.size = <size_t> self.buffers[index].len
        if own_bytes and array is given and view.data.size >= LENT_FROM_BYTES and may_lend(own_bytes):
            self.loans[index] = new_loan(array, own_bytes)
        self.row_bytes[index] = view.data.size // <size_t> max(1, self.rows)

    cdef object encode_bytes(self, int index, array, bint is_batched):
        """Encodes BYTES with their 4-byte little-endian lengths, one part for each selected member."""
        cdef int64_t at = 0
        cdef Slice *parts = <Slice *> calloc(<size_t> (self.last - self.first) + 1, sizeof(Slice))
        if parts == NULL:
            raise MemoryError
        self.parts[index] = parts
        for i in range(self.first, self.last):
            if self.members[i] == NULL:
                continue
            rows = array[at:at + self.members[i].rows] if is_batched else array
            at += self.members[i].rows
            chunks = []
            for element in rows.ravel().tolist():
                if isinstance(element, str):
                    element = element.encode()
                elif isinstance(element, (bytearray, memoryview)):
                    element = bytes(element)
                elif not isinstance(element, bytes):
                    element = str(element).encode()
                chunks.append(len(element).to_bytes(4, "little"))
                chunks.append(element)
            part = b"".join(chunks)
            self.kept.append(part)
            parts[i - self.first].data = <const uint8_t *> PyBytes_AS_STRING(part)
            parts[i - self.first].size = <size_t> PyBytes_GET_SIZE(part)

    cdef void encode(self) noexcept nogil:
        """Writes the answer of each selected member; what fails to fit fails alone."""
        cdef OutputView views[MAX_TENSORS]
        cdef Loan *loans[MAX_TENSORS]
        cdef bint is_batched = self.spec.max_batch_size > 0
        cdef Request *request
        cdef int64_t at = 0
        cdef int i, k, n
        for i in range(self.first, self.last):
            request = self.members[i]
            if request == NULL:
                continue
            if is_cancelled(request):
                fail_request(request, CANCELLED, b"cancelled")
                at += request.rows
                continue
            n = 0
            for k in range(self.n):
                if not request.output_mask >> k & 1:
                    continue
                views[n] = self.views[k]
                if is_batched:
                    views[n].dims[0] = request.rows
                if self.parts[k] != NULL:
                    views[n].data = self.parts[k][i - self.first]
                elif is_batched:
                    views[n].data.data += <size_t> at * self.row_bytes[k]
                    views[n].data.size = <size_t> request.rows * self.row_bytes[k]
                loans[n] = self.loans[k]
                views[n].is_lent = (loans[n] != NULL and request.sink != NULL and request.sink.takes_loans
                                    and views[n].data.size >= LENT_FROM_BYTES)
                n += 1
            if encode_answer(self.spec, request, views, loans, n, self.extra) < 0:
                fail_request(request, RESOURCE_EXHAUSTED, b"the answer does not fit into memory or into one message")
            at += request.rows
        for k in range(self.n):
            if self.loans[k] != NULL:   # each answer has a reference of its own
                drop_loan(self.loans[k])
                self.loans[k] = NULL
