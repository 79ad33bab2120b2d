# A serialized ModelInferRequest, read where it lies.
#
# Contract: pure functions on memory; no Python, no clock, no allocation. Every length is checked before it is used. All
# slices are views on the message that was scanned and live exactly as long as it does.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from aiorch_server._core.wire cimport MAX_DIMS, MAX_TENSORS, Slice, varint_size


cdef struct TensorView:
    Slice name
    Slice datatype
    int n_dims
    int64_t dims[MAX_DIMS]
    Slice data              # filled from raw_input_contents, in order


cdef struct InferScan:
    Slice model_name
    Slice model_version
    Slice id
    int n_inputs
    int n_raw
    int n_outputs
    bint is_plain           # False: well-formed, but holds something that only the Python plane carries
    uint64_t priority       # 0: not given
    int64_t timeout_us      # 0: not given
    TensorView inputs[MAX_TENSORS]
    Slice outputs[MAX_TENSORS]  # names of requested outputs
    Slice raw[MAX_TENSORS]  # raw_input_contents as they came


cdef enum ScanResult:
    SCAN_OK = 0
    SCAN_MALFORMED = -1


# Reads one serialized ModelInferRequest. `scan` is written from the start; on SCAN_MALFORMED its content is void.
cdef ScanResult scan_request(const uint8_t *message, size_t size, InferScan *scan) noexcept nogil

# The same for a message whose last field is a tensor that lies elsewhere; `head` is what comes before that field.
cdef ScanResult scan_parts(const uint8_t *head, size_t head_size, Slice tensor, InferScan *scan) noexcept nogil

# Where in a message the tensor begins that fills most of it, judged by the first `size` bytes; 0: there is none.
cdef size_t find_tensor(const uint8_t *head, size_t size, size_t message_size) noexcept nogil

# True if `data` holds exactly `count` BYTES elements, each with its 4-byte little-endian length.
cdef bint check_bytes_elements(const uint8_t *data, size_t size, int64_t count) noexcept nogil

# What comes before the field of a tensor that begins at the byte `tensor_at` of a message and is its end.
cdef inline size_t find_head_size(size_t tensor_at, size_t message_size) noexcept nogil:
    return tensor_at - 1 - varint_size(message_size - tensor_at)

# Moves behind one BYTES element; False, and no move, where there is no whole one.
cdef inline bint skip_element(const uint8_t *data, size_t size, size_t *position) noexcept nogil:
    cdef size_t at = position[0]
    cdef size_t length
    if size - at < 4:
        return False
    length = data[at] | (<size_t> data[at + 1] << 8) | (<size_t> data[at + 2] << 16) | (<size_t> data[at + 3] << 24)
    if length > size - at - 4:
        return False
    position[0] = at + 4 + length
    return True

# For who reads other messages: one field of any kind, or NULL for what is cut off or not protobuf; `content` is set for
# length-delimited ones, `value` for varints. And an InferInputTensor or InferOutputTensor.
cdef const uint8_t *read_field(const uint8_t *at, const uint8_t *end, uint32_t *number, uint32_t *kind,
                               uint64_t *value, Slice *content) noexcept nogil
cdef ScanResult scan_tensor(Slice content, TensorView *tensor, bint *is_plain) noexcept nogil
