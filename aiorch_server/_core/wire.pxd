# The V2 wire format of ModelInfer, read and written without generated classes: what both directions share.
#
# wire_request reads, wire_response writes, wire_messages does both for Python callers.
# Field numbers: WIRE of the V2 service, see proto/aiorch/v2/inference.proto; encoding:
# https://protobuf.dev/programming-guides/encoding/.

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint64_t


cdef enum:
    MAX_TENSORS = 64        # inputs or outputs of one model; a bound of the scanner's memory
    MAX_DIMS = 8


cdef struct Slice:
    const uint8_t *data
    size_t size


cdef inline bint slice_equals(const Slice *a, const Slice *b) noexcept nogil:
    cdef size_t i
    if a.size != b.size:
        return False
    for i in range(a.size):
        if a.data[i] != b.data[i]:
            return False
    return True

cdef inline size_t varint_size(uint64_t value) noexcept nogil:
    cdef size_t n = 1
    while value >= 0x80:
        value >>= 7
        n += 1
    return n

cdef inline uint8_t *put_varint(uint8_t *out, uint64_t value) noexcept nogil:
    while value >= 0x80:
        out[0] = <uint8_t> (value | 0x80)
        out += 1
        value >>= 7
    out[0] = <uint8_t> value
    return out + 1
