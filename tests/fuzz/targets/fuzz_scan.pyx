"""Target ``scan``: the scanner, and the check of what it found against models, on memory alone.

What the scanner gives lies inside of the message; what a model accepts has the bytes that its shape says.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort, free, malloc
from libc.string cimport memcpy

from aiorch_server._core.request cimport Request, free_request, new_request
from aiorch_server._core.spec cimport ModelSpec, SpecState, bind_request
from aiorch_server._core.wire cimport MAX_DIMS, MAX_TENSORS, Slice
from aiorch_server._core.wire_request cimport SCAN_OK, InferScan, scan_request

from aiorch_server.types import DataType, ModelSignature, TensorSpec


cdef void demand(bint is_true, const char *law) noexcept nogil:
    if not is_true:
        fprintf(stderr, "broken: %s\n", law)
        abort()


cdef void check_view(const Slice *view, const uint8_t *data, size_t size) noexcept nogil:
    demand(view.size == 0 or (view.data >= data and view.size <= size
                              and <size_t> (view.data - data) <= size - view.size), "a view lies inside of the message")


cdef void check_bound(const SpecState *spec, const InferScan *scan, Request *request) noexcept nogil:
    """What must be true of a request that the model accepts."""
    cdef int64_t elements
    cdef int i, k, at
    demand(request.rows >= 1 and (spec.max_batch_size == 0 or request.rows <= spec.max_batch_size), "rows fit")
    check_view(&request.id, request.message, request.message_size)
    for i in range(spec.n_inputs):
        at = spec.inputs[i].key_at
        if request.inputs[i].data == NULL:
            demand(spec.inputs[i].is_optional, "what is required is there")
            continue
        check_view(&request.inputs[i], request.message, request.message_size)
        elements = request.rows if spec.max_batch_size else 1
        for k in range(spec.inputs[i].n_dims):
            demand(request.shape_key[at + k] >= 0, "a present input has sizes")
            demand(spec.inputs[i].dims[k] < 0 or spec.inputs[i].dims[k] == request.shape_key[at + k], "sizes fit")
            elements *= request.shape_key[at + k]
        if spec.inputs[i].itemsize:
            demand(<uint64_t> elements * <uint64_t> spec.inputs[i].itemsize == request.inputs[i].size,
                   "an input has the bytes that its shape says")


cdef SpecState *specs[8]
cdef int n_specs = 0
cdef list kept = []


cdef int run_scan(const uint8_t *data, size_t size) noexcept nogil:
    cdef InferScan scan
    cdef Request *request
    cdef uint8_t *message = <uint8_t *> malloc(size)
    cdef int i, k
    demand(message != NULL or size == 0, "there is memory")
    if size:
        memcpy(message, data, size)
    if scan_request(message, size, &scan) != SCAN_OK:
        free(message)
        return 0
    demand(0 <= scan.n_inputs <= MAX_TENSORS and 0 <= scan.n_outputs <= MAX_TENSORS and 0 <= scan.n_raw <= MAX_TENSORS,
           "counts are within bounds")
    check_view(&scan.model_name, message, size)
    check_view(&scan.model_version, message, size)
    check_view(&scan.id, message, size)
    demand(scan.timeout_us >= 0, "timeouts are not negative")
    for i in range(scan.n_inputs):
        demand(0 <= scan.inputs[i].n_dims <= MAX_DIMS, "counts are within bounds")
        check_view(&scan.inputs[i].name, message, size)
        check_view(&scan.inputs[i].datatype, message, size)
        check_view(&scan.inputs[i].data, message, size)
    for i in range(scan.n_outputs):
        check_view(&scan.outputs[i], message, size)
    for k in range(n_specs):
        request = new_request(message, size, specs[k].n_inputs, specs[k].n_key, NULL, NULL)
        demand(request != NULL, "there is memory")
        if bind_request(specs[k], &scan, request):
            check_bound(specs[k], &scan, request)
        request.message = NULL      # the next one's
        free_request(request)
    free(message)
    return 0


def _keep(max_batch_size, *inputs):
    global n_specs
    cdef ModelSpec spec = ModelSpec("m", 1, ModelSignature(inputs, (TensorSpec("Y", DataType.FP32, (-1,)),), max_batch_size))
    kept.append(spec)
    specs[n_specs] = spec.state
    n_specs += 1


_keep(8, TensorSpec("X", DataType.FP32, (-1,)), TensorSpec("T", DataType.BYTES, (-1,), optional=True))
_keep(0, TensorSpec("X", DataType.FP32, (2, -1)))
_keep(4, TensorSpec("X", DataType.INT64, ()), TensorSpec("M", DataType.INT8, (-1, -1), optional=True))
_keep(8, TensorSpec("X", DataType.BYTES, (2,)))
_keep(1 << 20, *[TensorSpec(f"i{i}", DataType.UINT8, (-1,), optional=i > 0) for i in range(MAX_TENSORS)])

TARGETS = {"scan": <size_t> &run_scan}
