# What a loaded model takes and gives, as the compiled path checks it.

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint64_t

from aiorch_server._core.request cimport Request
from aiorch_server._core.wire cimport MAX_DIMS, MAX_TENSORS, Slice
from aiorch_server._core.wire_request cimport InferScan


cdef struct TensorLayout:
    Slice name
    Slice datatype
    Slice head              # outputs: the encoded name and datatype fields of a response tensor
    int itemsize            # 0: BYTES
    int n_dims              # without the batch dimension
    int64_t dims[MAX_DIMS]  # -1: any
    bint is_optional
    bint is_ragged          # members of a batch may bring different sizes
    int key_at              # inputs: where its dimensions start in the shape key
    int mark_at             # inputs: a number of the key that only tells present from absent; -1: its dimensions do


cdef struct SpecText:        # a string that slices point to
    SpecText *next


# Counted references: the ModelSpec object holds one, and each scheduler; whoever drops the last needs no interpreter.
cdef struct SpecState:
    int references
    SpecText *texts         # owned
    int64_t max_batch_size  # 0: no batch dimension, a request is a batch
    int n_inputs
    int n_outputs
    int n_required
    int n_key               # of the shape key: first what members of a batch share, then the sizes of ragged inputs
    int n_shared
    Slice response_head     # the encoded model_name and model_version fields of a response
    TensorLayout inputs[MAX_TENSORS]
    TensorLayout outputs[MAX_TENSORS]


cdef enum:
    ABSENT = -2             # in a shape key: an optional input that the request leaves out
    # The other sizes of an empty tensor cost nothing on the wire, but numpy multiplies them; validation.py has it too.
    MAX_EMPTY_ELEMENTS = 0x7FFFFFFF


cdef class ModelSpec:
    cdef SpecState *state
    cdef readonly str name
    cdef readonly int version
    cdef readonly object signature

    cdef object keep(self, bytes text, Slice *slice)
    cdef object place_key(self, TensorLayout *layout)
    cdef object describe(self, tensor, TensorLayout *layout)


cdef void retain_spec(SpecState *spec) noexcept nogil
cdef void release_spec(SpecState *spec) noexcept nogil

# Rows and bytes per row of the request's last tensor, which may not be read yet; 0: it is no rows of fixed-size elements
# that a batch may view where they lie.
cdef size_t measure_rows(const SpecState *spec, const InferScan *scan, int64_t *rows) noexcept nogil
# Checks a plain scan against the model and fills request.inputs, shape_key, output_mask, rows and id.
# False: something is not as the model wants it (the Python plane finds the words); `request` is void then.
cdef bint bind_request(const SpecState *spec, const InferScan *scan, Request *request) noexcept nogil
