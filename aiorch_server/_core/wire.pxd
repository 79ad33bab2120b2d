# The V2 wire format of ModelInfer, read and written without generated classes.
#
# Contract: pure functions on memory; no Python, no clock, no allocation but where said. Every length is checked
# before it is used. All slices are views on the message that was scanned and live exactly as long as it does.
# Field numbers: WIRE of the V2 service, see proto/aiorch/v2/inference.proto; encoding:
# https://protobuf.dev/programming-guides/encoding/.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t


cdef enum:
    MAX_TENSORS = 64        # inputs or outputs of one model; a bound of the scanner's memory
    MAX_DIMS = 8


cdef struct Slice:
    const uint8_t *data
    size_t size


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

# One output of a response. `head` holds the encoded name and datatype fields, which never change for a model.
cdef struct OutputView:
    Slice head
    int n_dims
    int64_t dims[MAX_DIMS]
    Slice data
    bint is_lent            # its bytes are not written but left out, before the byte `gap_at` of what is written
    size_t gap_at


# Size of a ModelInferResponse with what is lent; `head` holds the encoded model_name and model_version fields.
cdef size_t response_size(const Slice *head, const Slice *id, const OutputView *outputs, int n) noexcept nogil
# Where in a response of which nothing is lent the bytes of its largest output begin.
cdef size_t find_output(const Slice *head, const Slice *id, const OutputView *outputs, int n) noexcept nogil
# Writes exactly response_size(...) bytes at `out`, less those that are lent; sets each gap_at.
cdef void write_response(uint8_t *out, const Slice *head, const Slice *id, OutputView *outputs,
                         int n) noexcept nogil
# True if `data` holds exactly `count` BYTES elements, each with its 4-byte little-endian length.
cdef bint check_bytes_elements(const uint8_t *data, size_t size, int64_t count) noexcept nogil

cdef bytes encode_field(uint8_t tag, object content)

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

# What comes before the field of a tensor that begins at the byte `tensor_at` of a message and is its end.
cdef inline size_t find_head_size(size_t tensor_at, size_t message_size) noexcept nogil:
    return tensor_at - 1 - varint_size(message_size - tensor_at)
