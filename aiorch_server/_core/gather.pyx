"""Tensors of several requests as one array; see gather.pxd."""

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.string cimport memcpy

from aiorch_server._core.buffers cimport (
    ALIGNMENT_BYTES,
    COPY_GATHERED,
    HeldBuffer,
    count_copied,
    drop_buffer,
    hold_for_python,
    new_buffer,
)
from aiorch_server._core.request cimport find_buffer
from aiorch_server._core.spec cimport TensorLayout

import numpy as np

cdef size_t BIG_BYTES = 65536     # inputs from here on have memory of their own; below, copying costs less than that
# Below this a copy is quicker than giving the interpreter lock away and, where other threads are busy, getting it back.
cdef size_t UNLOCKED_COPY_BYTES = 1 << 20


cdef class Staging:
    """Reused memory for one input."""

    cdef object shaped(self, tuple shape, object dtype, size_t size):
        """An array over the staging memory, 64-byte aligned; valid until the next call."""
        cdef Py_buffer buffer
        if size > self._capacity or self._memory is None:
            # never shrinks below what was once needed: batches of one model have one order of magnitude
            self._view = None   # first: it must not outlive the memory, whatever fails below
            self._memory = np.empty(max(size, 2 * self._capacity) + 64, np.uint8)
            PyObject_GetBuffer(self._memory, &buffer, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)
            self._data = <uint8_t *> ((<size_t> buffer.buf + 63) & ~<size_t> 63)
            self._capacity = <size_t> buffer.len - 64
            offset = self._data - <uint8_t *> buffer.buf
            PyBuffer_Release(&buffer)
            self._memory = self._memory[offset:offset + self._capacity]
        if self._view is None or self._view_shape != shape:
            self._view = self._memory[:size].view(dtype).reshape(shape)
            self._view_shape = shape
        # a view of its own for each batch: the model may change shape, type and flags of what it gets
        return self._view.view()


cdef tuple shape_of(const Selection *selection, int index, object tensor):
    cdef const SpecState *spec = selection.spec
    cdef const TensorLayout *layout = &spec.inputs[index]
    cdef int at = selection.first
    if layout.is_ragged and selection.last - selection.first > 1:
        raise RuntimeError(f"input '{tensor.name}' is ragged: each member "
                           "has to be gathered on its own")
    while selection.members[at] == NULL:
        at += 1
    cdef const int64_t *dims = selection.members[at].shape_key + layout.key_at
    shape = [dims[i] for i in range(layout.n_dims)]
    if spec.max_batch_size > 0:
        shape.insert(0, selection.rows)
    return tuple(shape)


cdef object gather_plain(const Selection *selection, int index, object tensor, Staging staging):
    cdef size_t size = 0
    cdef bint is_bool
    for i in range(selection.first, selection.last):
        if selection.members[i] != NULL:
            size += selection.members[i].inputs[index].size
    dtype = tensor.datatype.numpy
    is_bool = dtype.kind == "b"
    if size >= BIG_BYTES and not is_bool:
        return gather_big(selection, index, tensor, size)
    array = staging.shaped(shape_of(selection, index, tensor), dtype, size)
    if size < UNLOCKED_COPY_BYTES:
        copy_rows(selection, index, staging._data, is_bool)
    else:
        with nogil:
            copy_rows(selection, index, staging._data, is_bool)
    return array


cdef object gather_big(const Selection *selection, int index, object tensor, size_t size):
    """Memory of this batch alone: of one member the message itself, if its tensor lies well in it."""
    cdef Request *request = NULL
    cdef HeldBuffer held
    cdef uint8_t *rows
    cdef uint8_t *buffer = NULL
    for i in range(selection.first, selection.last):
        if selection.members[i] != NULL and selection.members[i].inputs[index].size:
            request = selection.members[i]
            break
    if request.inputs[index].size == size and <size_t> request.inputs[index].data % ALIGNMENT_BYTES == 0:
        buffer = find_buffer(request, request.inputs[index].data)
    if buffer != NULL:
        held = hold_for_python(buffer, <uint8_t *> request.inputs[index].data, size)
    else:
        rows = new_buffer(size, 0)
        if rows == NULL:
            raise MemoryError
        with nogil:
            copy_rows(selection, index, rows, False)
        held = hold_for_python(rows, rows, size)
        drop_buffer(rows)
    return np.ndarray(shape_of(selection, index, tensor), tensor.datatype.numpy, held)


cdef void copy_rows(const Selection *selection, int index, uint8_t *out, bint is_bool) noexcept nogil:
    cdef uint8_t *at = out
    cdef size_t size
    for i in range(selection.first, selection.last):
        if selection.members[i] != NULL:
            size = selection.members[i].inputs[index].size
            memcpy(at, selection.members[i].inputs[index].data, size)
            count_copied(COPY_GATHERED, size)
            at += size
    if is_bool:     # C and C++ behind the model rely on 0 and 1; a client may send any byte
        while out < at:
            out[0] = out[0] != 0
            out += 1


cdef object gather_bytes(const Selection *selection, int index, object tensor):
    cdef const uint8_t *at
    cdef const uint8_t *end
    cdef size_t length
    cdef list elements = []
    for i in range(selection.first, selection.last):
        if selection.members[i] == NULL:
            continue
        at = selection.members[i].inputs[index].data
        end = at + selection.members[i].inputs[index].size
        while at < end:     # lengths were checked when the request was bound
            length = at[0] | <size_t> at[1] << 8 | <size_t> at[2] << 16 | <size_t> at[3] << 24
            elements.append(PyBytes_FromStringAndSize(<const char *> at + 4, <Py_ssize_t> length))
            at += 4 + length
    array = np.empty(len(elements), dtype=np.object_)
    array[:] = elements
    return array.reshape(shape_of(selection, index, tensor))


cdef object gather_tensor(const Selection *selection, int index, object tensor, Staging staging):
    if selection.spec.inputs[index].itemsize == 0:
        return gather_bytes(selection, index, tensor)
    return gather_plain(selection, index, tensor, staging)
