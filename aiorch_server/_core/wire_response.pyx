"""Writes ModelInferResponse straight into memory; see wire_response.pxd."""

from libc.stdint cimport uint64_t
from libc.string cimport memcpy

from aiorch_server._core.wire cimport put_varint, varint_size


cdef inline uint8_t *put_bytes(uint8_t *out, uint8_t tag, const uint8_t *data, size_t size) noexcept nogil:
    out[0] = tag
    out = put_varint(out + 1, size)
    if size:
        memcpy(out, data, size)
    return out + size


cdef inline size_t shape_size(const int64_t *dims, int n_dims) noexcept nogil:
    cdef size_t size = 0
    for i in range(n_dims):
        size += varint_size(<uint64_t> dims[i])
    return size


cdef inline size_t field_size(size_t content) noexcept nogil:
    return 1 + varint_size(content) + content


cdef inline size_t output_head_size(const OutputView *output) noexcept nogil:
    return output.head.size + field_size(shape_size(output.dims, output.n_dims))


cdef size_t response_size(const Slice *head, const Slice *id, const OutputView *outputs, int n) noexcept nogil:
    cdef size_t size = head.size
    if id.size:
        size += field_size(id.size)
    for i in range(n):
        size += field_size(output_head_size(&outputs[i])) + field_size(outputs[i].data.size)
    return size


cdef size_t find_output(const Slice *head, const Slice *id, const OutputView *outputs, int n) noexcept nogil:
    cdef size_t at = response_size(head, id, outputs, n)
    cdef int largest = 0
    for i in range(1, n):
        if outputs[i].data.size > outputs[largest].data.size:
            largest = i
    for i in range(largest + 1, n):     # the contents come last, in the order of the outputs
        at -= field_size(outputs[i].data.size)
    return at - outputs[largest].data.size if n else 0


cdef void write_response(uint8_t *out, const Slice *head, const Slice *id, OutputView *outputs,
                         int n) noexcept nogil:
    cdef const OutputView *output
    cdef uint8_t *start = out
    memcpy(out, head.data, head.size)
    out += head.size
    if id.size:
        out = put_bytes(out, 0x1A, id.data, id.size)
    for i in range(n):
        output = &outputs[i]
        out[0] = 0x2A
        out = put_varint(out + 1, output_head_size(output))
        memcpy(out, output.head.data, output.head.size)
        out += output.head.size
        out[0] = 0x1A
        out = put_varint(out + 1, shape_size(output.dims, output.n_dims))
        for k in range(output.n_dims):
            out = put_varint(out, <uint64_t> output.dims[k])
    for i in range(n):
        if not outputs[i].is_lent:
            out = put_bytes(out, 0x32, outputs[i].data.data, outputs[i].data.size)
            continue
        out[0] = 0x32
        out = put_varint(out + 1, outputs[i].data.size)
        outputs[i].gap_at = <size_t> (out - start)
