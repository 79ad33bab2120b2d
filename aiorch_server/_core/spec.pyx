"""What a model takes and gives, and the check of a request against it."""

from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy

from aiorch_server._core.request cimport aiorch_add_reference
from aiorch_server._core.wire cimport slice_equals
from aiorch_server._core.wire_messages cimport encode_field
from aiorch_server._core.wire_request cimport TensorView, check_bytes_elements


cdef bint fits_shape(const TensorLayout *layout, const TensorView *tensor, int batch_dims) noexcept nogil:
    cdef int64_t dim
    cdef int i
    if tensor.n_dims != layout.n_dims + batch_dims:
        return False
    for i in range(layout.n_dims):
        dim = tensor.dims[i + batch_dims]
        if dim < 0 or (layout.dims[i] >= 0 and dim != layout.dims[i]):
            return False
    return True


cdef bint fits_size(const TensorLayout *layout, const TensorView *tensor) noexcept nogil:
    """True if the raw content has exactly the bytes that the shape says; overflowing products do not fit."""
    cdef uint64_t count = 1
    cdef uint64_t bound = tensor.data.size + 1
    cdef bint is_empty = False
    for i in range(tensor.n_dims):
        if tensor.dims[i] == 0:
            is_empty = True
            bound = MAX_EMPTY_ELEMENTS
    for i in range(tensor.n_dims):
        if tensor.dims[i] == 0:
            continue
        if <uint64_t> tensor.dims[i] > bound or count > bound // <uint64_t> tensor.dims[i]:
            return False    # more elements than there are bytes
        count *= <uint64_t> tensor.dims[i]
    if is_empty:
        return tensor.data.size == 0
    if layout.itemsize == 0:
        return check_bytes_elements(tensor.data.data, tensor.data.size, <int64_t> count)
    return count * <uint64_t> layout.itemsize == tensor.data.size


cdef int find_tensor(const TensorLayout *layouts, int n, const Slice *name, int guess) noexcept nogil:
    """Index of the tensor of that name, tried at `guess` first because clients keep the model's order; -1: none."""
    if guess < n and slice_equals(&layouts[guess].name, name):
        return guess
    for i in range(n):
        if slice_equals(&layouts[i].name, name):
            return i
    return -1


cdef size_t measure_rows(const SpecState *spec, const InferScan *scan, int64_t *rows) noexcept nogil:
    cdef const TensorView *tensor
    cdef const TensorLayout *layout
    cdef int index
    if not scan.is_plain or scan.n_inputs == 0 or spec.max_batch_size < 2:
        return 0
    tensor = &scan.inputs[scan.n_inputs - 1]
    index = find_tensor(spec.inputs, spec.n_inputs, &tensor.name, scan.n_inputs - 1)
    if index < 0:
        return 0
    layout = &spec.inputs[index]
    # BYTES have no fixed size, BOOL is made 0 and 1 on its way to the model, rows of ragged inputs differ
    if (layout.is_ragged or layout.itemsize == 0 or layout.datatype.data[0] == c'B' and layout.itemsize == 1
            or not slice_equals(&tensor.datatype, &layout.datatype) or not fits_shape(layout, tensor, 1)
            or not 1 <= tensor.dims[0] <= spec.max_batch_size or not fits_size(layout, tensor)):
        return 0
    rows[0] = tensor.dims[0]
    return tensor.data.size // <size_t> tensor.dims[0]


cdef bint bind_request(const SpecState *spec, const InferScan *scan, Request *request) noexcept nogil:
    cdef const TensorView *tensor
    cdef const TensorLayout *layout
    cdef int batch_dims = 1 if spec.max_batch_size > 0 else 0
    cdef int n_required = 0
    cdef int i, k, index
    cdef uint64_t seen = 0
    cdef int64_t rows = 1
    if not scan.is_plain or scan.n_inputs == 0:
        return False
    for i in range(spec.n_key):
        request.shape_key[i] = ABSENT
    for i in range(scan.n_inputs):
        tensor = &scan.inputs[i]
        index = find_tensor(spec.inputs, spec.n_inputs, &tensor.name, i)
        if index < 0 or seen >> index & 1:
            return False
        seen |= <uint64_t> 1 << index
        layout = &spec.inputs[index]
        if not slice_equals(&tensor.datatype, &layout.datatype) or not fits_shape(layout, tensor, batch_dims):
            return False
        if batch_dims:
            if i == 0:
                rows = tensor.dims[0]
                if rows < 1 or rows > spec.max_batch_size:
                    return False
            elif tensor.dims[0] != rows:
                return False
        if not fits_size(layout, tensor):
            return False
        request.inputs[index] = tensor.data
        if tensor.data.data == NULL:
            request.inputs[index].data = request.message    # present but empty is not absent
        for k in range(layout.n_dims):
            request.shape_key[layout.key_at + k] = tensor.dims[k + batch_dims]
        if layout.mark_at >= 0:
            request.shape_key[layout.mark_at] = 0
        if not layout.is_optional:
            n_required += 1
    if n_required != spec.n_required:
        return False
    request.output_mask = 0
    for i in range(scan.n_outputs):
        index = find_tensor(spec.outputs, spec.n_outputs, &scan.outputs[i], i)
        if index < 0:
            return False
        request.output_mask |= <uint64_t> 1 << index
    if scan.n_outputs == 0:
        request.output_mask = <uint64_t> -1
    request.rows = rows
    request.id = scan.id
    return True


cdef void retain_spec(SpecState *spec) noexcept nogil:
    aiorch_add_reference(&spec.references, 1)


cdef void release_spec(SpecState *spec) noexcept nogil:
    cdef SpecText *text
    if aiorch_add_reference(&spec.references, -1) > 0:
        return
    while spec.texts != NULL:
        text = spec.texts
        spec.texts = text.next
        free(text)
    free(spec)


cdef class ModelSpec:
    """A model version's name and signature in the form that the compiled path reads; immutable."""

    def __cinit__(self, str name not None, int version, signature not None):
        """Takes a ``ModelSignature``; ValueError where it exceeds what the compiled path can hold."""
        self.state = <SpecState *> calloc(1, sizeof(SpecState))
        if self.state == NULL:
            raise MemoryError
        self.state.references = 1
        self.name = name
        self.version = version
        self.signature = signature
        if len(signature.inputs) > MAX_TENSORS or len(signature.outputs) > MAX_TENSORS:
            raise ValueError(f"a model has at most {MAX_TENSORS} inputs and {MAX_TENSORS} outputs")
        if not 0 <= signature.max_batch_size <= 1 << 20:
            raise ValueError(f"max_batch_size is {signature.max_batch_size}; it must be within 0..{1 << 20}")
        self.state.max_batch_size = signature.max_batch_size
        self.state.n_inputs = len(signature.inputs)
        self.state.n_outputs = len(signature.outputs)
        self.keep(encode_field(0x0A, name.encode()) + encode_field(0x12, str(version).encode()),
                  &self.state.response_head)
        for i, tensor in enumerate(signature.inputs):
            self.describe(tensor, &self.state.inputs[i])
            self.place_key(&self.state.inputs[i])
            if not tensor.optional:
                self.state.n_required += 1
        self.state.n_shared = self.state.n_key
        for i in range(self.state.n_inputs):
            if self.state.inputs[i].is_ragged:
                self.state.inputs[i].key_at = self.state.n_key
                self.state.n_key += self.state.inputs[i].n_dims
        for i, tensor in enumerate(signature.outputs):
            self.describe(tensor, &self.state.outputs[i])

    def __dealloc__(self):
        if self.state != NULL:
            release_spec(self.state)

    cdef object keep(self, bytes text, Slice *slice):
        cdef size_t size = <size_t> len(text)
        cdef SpecText *copy = <SpecText *> malloc(sizeof(SpecText) + size)
        if copy == NULL:
            raise MemoryError
        copy.next = self.state.texts
        self.state.texts = copy
        memcpy(copy + 1, <char *> text, size)
        slice.data = <const uint8_t *> (copy + 1)
        slice.size = size

    cdef object place_key(self, TensorLayout *layout):
        layout.mark_at = -1
        layout.key_at = self.state.n_key
        if layout.is_ragged or layout.n_dims == 0:
            layout.mark_at = self.state.n_key
            self.state.n_key += 1
        else:
            self.state.n_key += layout.n_dims

    cdef object describe(self, tensor, TensorLayout *layout):
        # one dimension is kept free for the batch
        if len(tensor.shape) >= MAX_DIMS:
            raise ValueError(f"tensor '{tensor.name}' has {len(tensor.shape)} dimensions; at most {MAX_DIMS - 1} work")
        datatype = tensor.datatype.value.encode()
        self.keep(tensor.name.encode(), &layout.name)
        self.keep(datatype, &layout.datatype)
        self.keep(encode_field(0x0A, tensor.name.encode()) + encode_field(0x12, datatype), &layout.head)
        layout.itemsize = tensor.datatype.itemsize
        layout.n_dims = len(tensor.shape)
        layout.is_optional = tensor.optional
        layout.is_ragged = tensor.is_ragged
        for i, dim in enumerate(tensor.shape):
            layout.dims[i] = dim
