"""ONNX Runtime through its C API: sessions that are opened, and batches that run, without the interpreter."""

from collections import namedtuple

from cpython.buffer cimport PyBUF_C_CONTIGUOUS, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.pycapsule cimport PyCapsule_New
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

import threading

import numpy as np

cdef extern from "<dlfcn.h>" nogil:
    void *dlopen(const char *path, int flags)
    void *dlsym(void *library, const char *name)
    const char *dlerror()
    int RTLD_NOW
    int RTLD_LOCAL

cdef extern from "aiorch_instance.h" nogil:
    const char *AIORCH_INSTANCE_CAPSULE
    enum:
        AIORCH_INSTANCE_ABI
        AIORCH_MAX_DIMS
    ctypedef struct AiorchTensor:
        void *data
        size_t size
        int32_t n_dims
        int64_t dims[8]
    ctypedef struct AiorchInstance:
        uint32_t abi
        void *model
        int (*run)(void *model, const AiorchTensor *inputs, AiorchTensor *outputs, char *error,
                   size_t error_size) noexcept nogil

cdef extern from "ort_api.h" nogil:
    ctypedef void *const *OrtTable
    ctypedef struct OrtBase:
        OrtTable (*get_table)(uint32_t version)
    ctypedef void OrtStatus
    enum:
        ORT_API_LEAST_VERSION
        ORT_STATUS
        ORT_SESSION
        ORT_VALUE
        ORT_TYPE
        ORT_SHAPE
        ORT_OPTIONS
    const char *ort_message(OrtTable, const OrtStatus *)
    void ort_release(OrtTable, int, void *)
    OrtStatus *ort_create_environment(OrtTable, int, const char *, void **)
    OrtStatus *ort_get_allocator(OrtTable, void **)
    OrtStatus *ort_describe_cpu_memory(OrtTable, void **)
    OrtStatus *ort_create_options(OrtTable, void **)
    OrtStatus *ort_set_sequential(OrtTable, void *)
    OrtStatus *ort_set_log_level(OrtTable, void *, int)
    OrtStatus *ort_set_optimization(OrtTable, void *, int)
    OrtStatus *ort_set_intra_threads(OrtTable, void *, int)
    OrtStatus *ort_set_inter_threads(OrtTable, void *, int)
    OrtStatus *ort_set_entry(OrtTable, void *, const char *, const char *)
    OrtStatus *ort_open(OrtTable, void *, const char *, void *, void **)
    OrtStatus *ort_count(OrtTable, void *, int, size_t *)
    OrtStatus *ort_get_type(OrtTable, void *, int, size_t, void **)
    OrtStatus *ort_get_name(OrtTable, void *, int, size_t, void *, char **)
    OrtStatus *ort_free(OrtTable, void *, void *)
    OrtStatus *ort_get_tensor_type(OrtTable, void *, void **)
    OrtStatus *ort_get_element(OrtTable, void *, int *)
    OrtStatus *ort_count_dims(OrtTable, void *, size_t *)
    OrtStatus *ort_get_dims(OrtTable, void *, int64_t *, size_t)
    OrtStatus *ort_wrap_tensor(OrtTable, void *, void *, size_t, const int64_t *, size_t, int, void **)
    OrtStatus *ort_run(OrtTable, void *, const char *const *, void *const *, size_t, const char *const *, size_t, void **)
    OrtStatus *ort_get_data(OrtTable, void *, void **)
    OrtStatus *ort_get_shape(OrtTable, void *, void **)

cdef enum:
    ERROR_BYTES = 1024
    LOG_FATAL = 4               # errors come back as such; written to stderr too, clients could fill the log with them
    MAX_TENSORS = 64            # inputs or outputs of one model, as in the server's core

#: By ONNXTensorElementDataType: the name in ONNX Runtime's Python API, the item size, numpy's type (BF16: bit patterns).
ELEMENTS = {
    1: ("float", 4, np.float32), 2: ("uint8", 1, np.uint8), 3: ("int8", 1, np.int8), 4: ("uint16", 2, np.uint16),
    5: ("int16", 2, np.int16), 6: ("int32", 4, np.int32), 7: ("int64", 8, np.int64), 9: ("bool", 1, np.bool_),
    10: ("float16", 2, np.float16), 11: ("double", 8, np.float64), 12: ("uint32", 4, np.uint32),
    13: ("uint64", 8, np.uint64), 16: ("bfloat16", 2, np.uint16),
}
Node = namedtuple("Node", "name type shape")


cdef struct Runtime:            # what a loaded library gives once per process; never freed, sessions may outlive modules
    OrtTable table
    void *environment
    void *allocator
    void *memory

cdef dict _runtimes = {}        # path -> address of a Runtime
_runtimes_lock = threading.Lock()


cdef int check(OrtTable table, OrtStatus *status) except -1:
    """Raises RuntimeError with the library's words, and frees the status."""
    if status == NULL:
        return 0
    text = (<bytes> ort_message(table, status)).decode("utf-8", "replace")
    ort_release(table, ORT_STATUS, status)
    raise RuntimeError(text)


cdef Runtime *find_runtime(str path) except NULL:
    cdef void *library
    cdef void *base
    cdef Runtime *runtime
    with _runtimes_lock:
        if path in _runtimes:
            return <Runtime *> <size_t> _runtimes[path]
        library = dlopen(path.encode(), RTLD_NOW | RTLD_LOCAL)
        if library == NULL:
            raise OSError((<bytes> dlerror()).decode())
        base = dlsym(library, b"OrtGetApiBase")
        if base == NULL:
            raise OSError(f"'{path}' does not give out ONNX Runtime's C API")
        runtime = <Runtime *> calloc(1, sizeof(Runtime))
        if runtime == NULL:
            raise MemoryError
        runtime.table = (<OrtBase *> (<void *(*)() noexcept nogil> base)()).get_table(ORT_API_LEAST_VERSION)
        if runtime.table == NULL:
            free(runtime)
            raise OSError(f"'{path}' is older than version {ORT_API_LEAST_VERSION} of ONNX Runtime's C API")
        check(runtime.table, ort_create_environment(runtime.table, LOG_FATAL, b"aiorch", &runtime.environment))
        check(runtime.table, ort_get_allocator(runtime.table, &runtime.allocator))
        check(runtime.table, ort_describe_cpu_memory(runtime.table, &runtime.memory))
        _runtimes[path] = <size_t> runtime
        return runtime


cdef class NativeSession:
    """A model opened on the CPU; looks like ``onnxruntime.InferenceSession`` as far as signatures are read from it.

    OSError: the library cannot be used; RuntimeError: the model does not load; TypeError: it takes or gives something
    that is not a tensor of a fixed item size.
    """

    cdef Runtime *runtime
    cdef void *session
    cdef list nodes             # inputs, outputs, overridable initializers

    def __init__(self, str library, str path, *, int threads, int optimization, entries):
        cdef OrtTable table
        cdef void *options = NULL
        cdef bytes file = path.encode()
        cdef const char *file_name = file
        cdef OrtStatus *status
        self.runtime = find_runtime(library)
        table = self.runtime.table
        check(table, ort_create_options(table, &options))
        try:
            check(table, ort_set_sequential(table, options))
            check(table, ort_set_log_level(table, options, LOG_FATAL))
            check(table, ort_set_optimization(table, options, optimization))
            check(table, ort_set_intra_threads(table, options, threads))
            check(table, ort_set_inter_threads(table, options, 1))
            for key, value in entries.items():
                check(table, ort_set_entry(table, options, key.encode(), value.encode()))
            with nogil:
                status = ort_open(table, self.runtime.environment, file_name, options, &self.session)
            check(table, status)
        finally:
            ort_release(table, ORT_OPTIONS, options)
        self.nodes = [self.describe(kind) for kind in range(3)]

    def __dealloc__(self):
        if self.session != NULL:
            ort_release(self.runtime.table, ORT_SESSION, self.session)

    cdef list describe(self, int kind):
        cdef OrtTable table = self.runtime.table
        cdef size_t n = 0, n_dims = 0
        cdef void *type = NULL
        cdef void *shape
        cdef char *name
        cdef int element
        cdef int64_t dims[64]
        check(table, ort_count(table, self.session, kind, &n))
        nodes = []
        for index in range(n):
            name, shape, element = NULL, NULL, 0
            check(table, ort_get_name(table, self.session, kind, index, self.runtime.allocator, &name))
            text = (<bytes> name).decode()
            check(table, ort_free(table, self.runtime.allocator, name))
            check(table, ort_get_type(table, self.session, kind, index, &type))
            try:
                check(table, ort_get_tensor_type(table, type, &shape))
                if shape != NULL:
                    check(table, ort_get_element(table, shape, &element))
                    check(table, ort_count_dims(table, shape, &n_dims))
                if element not in ELEMENTS or n_dims > 64:
                    raise TypeError(f"'{text}' is not a tensor of a fixed item size")
                check(table, ort_get_dims(table, shape, dims, n_dims))
            finally:
                ort_release(table, ORT_TYPE, type)
            nodes.append(Node(text, f"tensor({ELEMENTS[element][0]})", tuple(dims[i] for i in range(n_dims))))
        return nodes

    def get_inputs(self):
        """The required inputs; -1 is a dimension that may vary."""
        return self.nodes[0]

    def get_outputs(self):
        """The outputs, likewise."""
        return self.nodes[1]

    def get_overridable_initializers(self):
        """Constants of the graph that a caller may replace."""
        return self.nodes[2]

    def get_providers(self):
        """Where it runs, the first choice first."""
        return ["CPUExecutionProvider"]

    def make_runner(self, inputs, outputs):
        """What runs batches of these inputs and outputs, named in the signature's order."""
        return NativeRunner(self, inputs, outputs)


cdef struct RunState:           # everything that a run touches
    OrtTable table
    void *session
    void *memory
    int n_inputs
    int n_outputs
    const char **names          # inputs, then outputs
    int *elements               # likewise: ONNXTensorElementDataType
    size_t *item_sizes
    void **values               # outputs of the last run, then room for the inputs of the next
    const char **given          # the names of the inputs that are there


cdef int report(OrtTable table, OrtStatus *status, char *error, size_t error_size) noexcept nogil:
    snprintf(error, error_size, b"%s", ort_message(table, status))
    ort_release(table, ORT_STATUS, status)
    return -1


cdef void drop_values(RunState *state, void **values, int n) noexcept nogil:
    for i in range(n):
        if values[i] != NULL:
            ort_release(state.table, ORT_VALUE, values[i])
            values[i] = NULL


cdef OrtStatus *describe_output(RunState *state, int index, AiorchTensor *tensor) noexcept nogil:
    cdef OrtTable table = state.table
    cdef void *shape = NULL
    cdef size_t n_dims = 0
    cdef OrtStatus *status = ort_get_data(table, state.values[index], &tensor.data)
    if status == NULL:
        status = ort_get_shape(table, state.values[index], &shape)
    if status != NULL:
        return status
    status = ort_count_dims(table, shape, &n_dims)
    if status == NULL and n_dims <= AIORCH_MAX_DIMS:
        status = ort_get_dims(table, shape, tensor.dims, n_dims)
    ort_release(table, ORT_SHAPE, shape)
    tensor.n_dims = <int32_t> n_dims
    tensor.size = state.item_sizes[state.n_inputs + index]
    if n_dims <= AIORCH_MAX_DIMS:
        for i in range(<int> n_dims):
            tensor.size *= <size_t> tensor.dims[i]
    return status


cdef int run_batch(void *model, const AiorchTensor *inputs, AiorchTensor *outputs, char *error,
                   size_t error_size) noexcept nogil:
    """AiorchInstance.run: outputs are ONNX Runtime's own memory, kept until the next run."""
    cdef RunState *state = <RunState *> model
    cdef void **values = state.values + state.n_outputs
    cdef OrtStatus *status = NULL
    cdef int n = 0
    drop_values(state, state.values, state.n_outputs)
    for i in range(state.n_inputs):
        if inputs[i].data == NULL:
            continue
        status = ort_wrap_tensor(state.table, state.memory, inputs[i].data, inputs[i].size, inputs[i].dims,
                                 <size_t> inputs[i].n_dims, state.elements[i], &values[n])
        if status != NULL:
            break
        state.given[n] = state.names[i]
        n += 1
    if status == NULL:
        status = ort_run(state.table, state.session, state.given, values, <size_t> n,
                         state.names + state.n_inputs, <size_t> state.n_outputs, state.values)
    drop_values(state, values, n)
    if status != NULL:
        return report(state.table, status, error, error_size)
    for i in range(state.n_outputs):
        status = describe_output(state, i, &outputs[i])
        if status != NULL:
            return report(state.table, status, error, error_size)
    return 0


cdef class NativeRunner:
    """Runs batches on a session: by the server without the interpreter (``capsule``), or with ``execute``.

    ``inputs`` and ``outputs`` are the names to take and to give, in the signature's order. One thread at a time.
    """

    cdef NativeSession session
    cdef RunState state
    cdef AiorchInstance instance
    cdef readonly object capsule
    cdef list names             # encoded; the state points into them
    cdef tuple input_names
    cdef tuple output_names
    cdef list output_types

    def __init__(self, NativeSession session not None, inputs, outputs):
        nodes = {node.name: node for kind in session.nodes for node in kind}
        elements = {f"tensor({name})": (number, size, dtype) for number, (name, size, dtype) in ELEMENTS.items()}
        self.session, self.input_names, self.output_names = session, tuple(inputs), tuple(outputs)
        self.names = [name.encode() for name in (*inputs, *outputs)]
        self.state.table, self.state.session = session.runtime.table, session.session
        self.state.memory = session.runtime.memory
        self.state.n_inputs, self.state.n_outputs = len(self.input_names), len(self.output_names)
        if max(self.state.n_inputs, self.state.n_outputs) > MAX_TENSORS:
            raise ValueError(f"at most {MAX_TENSORS} inputs and outputs work")
        n = len(self.names) + 1
        self.state.names = <const char **> calloc(n, sizeof(char *))
        self.state.given = <const char **> calloc(n, sizeof(char *))
        self.state.elements = <int *> calloc(n, sizeof(int))
        self.state.item_sizes = <size_t *> calloc(n, sizeof(size_t))
        self.state.values = <void **> calloc(n, sizeof(void *))
        if (self.state.names == NULL or self.state.given == NULL or self.state.elements == NULL
                or self.state.item_sizes == NULL or self.state.values == NULL):
            raise MemoryError
        self.output_types = []
        for at, name in enumerate((*inputs, *outputs)):
            self.state.names[at] = <const char *> (<bytes> self.names[at])
            self.state.elements[at], self.state.item_sizes[at], dtype = elements[nodes[name].type]
            if at >= self.state.n_inputs:
                self.output_types.append(dtype)
        self.instance.abi, self.instance.model, self.instance.run = AIORCH_INSTANCE_ABI, &self.state, run_batch
        self.capsule = PyCapsule_New(&self.instance, AIORCH_INSTANCE_CAPSULE, NULL)

    def __dealloc__(self):
        if self.state.values != NULL:
            drop_values(&self.state, self.state.values, self.state.n_outputs)
        free(self.state.names)
        free(self.state.given)
        free(self.state.elements)
        free(self.state.item_sizes)
        free(self.state.values)

    def close(self):
        """Frees the outputs of the last run; the session goes with its last reference."""
        drop_values(&self.state, self.state.values, self.state.n_outputs)

    def execute(self, inputs):
        """As ``ModelInstance.execute``; outputs are fresh arrays. RuntimeError with ONNX Runtime's words."""
        cdef AiorchTensor given[MAX_TENSORS]
        cdef AiorchTensor answers[MAX_TENSORS]
        cdef Py_buffer buffers[MAX_TENSORS]
        cdef Py_buffer view
        cdef char error[ERROR_BYTES]
        cdef int result, held = 0, at
        memset(given, 0, sizeof(given))
        memset(answers, 0, sizeof(answers))
        try:
            for at, name in enumerate(self.input_names):
                if name not in inputs:
                    continue
                array = np.asarray(inputs[name], order="C")
                if array.ndim > AIORCH_MAX_DIMS:
                    raise ValueError(f"input '{name}' has {array.ndim} dimensions; at most {AIORCH_MAX_DIMS} work")
                PyObject_GetBuffer(array, &buffers[held], PyBUF_C_CONTIGUOUS)
                given[at].data, given[at].size = buffers[held].buf, <size_t> buffers[held].len
                held += 1
                given[at].n_dims = array.ndim
                for i, size in enumerate(array.shape):
                    given[at].dims[i] = size
            with nogil:
                result = run_batch(&self.state, given, answers, error, ERROR_BYTES)
        finally:
            for i in range(held):
                PyBuffer_Release(&buffers[i])
        if result != 0:
            raise RuntimeError((<bytes> error).decode("utf-8", "replace"))
        outputs = {}
        for at, name in enumerate(self.output_names):
            if answers[at].n_dims > AIORCH_MAX_DIMS:
                raise RuntimeError(f"output '{name}' has {answers[at].n_dims} dimensions; at most {AIORCH_MAX_DIMS} work")
            array = np.empty([answers[at].dims[i] for i in range(answers[at].n_dims)], self.output_types[at])
            if answers[at].size:
                PyObject_GetBuffer(array, &view, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)
                memcpy(view.buf, answers[at].data, answers[at].size)
                PyBuffer_Release(&view)
            outputs[name] = array
        return outputs
