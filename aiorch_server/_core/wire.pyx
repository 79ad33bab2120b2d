"""Reads ModelInferRequest and writes ModelInferResponse straight from and into memory."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcmp, memcpy

import struct


cdef const uint8_t *read_varint(const uint8_t *at, const uint8_t *end, uint64_t *value) noexcept nogil:
    """Next position, or NULL when the varint is cut off or longer than ten bytes."""
    cdef uint64_t result = 0
    cdef int shift = 0
    cdef uint8_t byte
    while at < end and shift < 64:
        byte = at[0]
        at += 1
        result |= (<uint64_t> (byte & 0x7F)) << shift
        if not byte & 0x80:
            value[0] = result
            return at
        shift += 7
    return NULL


cdef const uint8_t *read_field(const uint8_t *at, const uint8_t *end, uint32_t *number, uint32_t *kind,
                               uint64_t *value, Slice *content) noexcept nogil:
    """Reads one field of any kind; `content` is set for length-delimited ones, `value` for varints.

    Gives NULL for what is cut off or not protobuf. Groups (kinds 3 and 4) are refused too: nothing in the V2 service
    uses them, and the Python plane can still decide.
    """
    cdef uint64_t tag
    at = read_varint(at, end, &tag)
    if at == NULL or tag > 0xFFFFFFFFULL or (tag >> 3) == 0:
        return NULL
    number[0] = <uint32_t> (tag >> 3)
    kind[0] = <uint32_t> (tag & 7)
    if kind[0] == 0:
        return read_varint(at, end, value)
    if kind[0] == 1:
        return at + 8 if end - at >= 8 else NULL
    if kind[0] == 5:
        return at + 4 if end - at >= 4 else NULL
    if kind[0] != 2:
        return NULL
    at = read_varint(at, end, value)
    if at == NULL or value[0] > <uint64_t> (end - at):
        return NULL
    content.data = at
    content.size = <size_t> value[0]
    return at + content.size


cdef bint is_named(const Slice *name, const char *text, size_t size) noexcept nogil:
    return name.size == size and memcmp(name.data, text, size) == 0


cdef bint is_ascii(const Slice *text) noexcept nogil:
    cdef size_t i
    for i in range(text.size):
        if text.data[i] & 0x80:
            return False
    return True


cdef ScanResult scan_tensor(Slice content, TensorView *tensor, bint *is_plain) noexcept nogil:
    """InferInputTensor: name 1, datatype 2, shape 3 (packed or not); parameters 4 and contents 5 are not plain."""
    cdef const uint8_t *at = content.data
    cdef const uint8_t *end = at + content.size
    cdef const uint8_t *inner
    cdef const uint8_t *inner_end
    cdef uint32_t number = 0, kind = 0
    cdef uint64_t value = 0
    cdef Slice field
    field.data = NULL
    field.size = 0
    tensor.name.data = tensor.datatype.data = tensor.data.data = NULL
    tensor.name.size = tensor.datatype.size = tensor.data.size = 0
    tensor.n_dims = 0
    while at < end:
        at = read_field(at, end, &number, &kind, &value, &field)
        if at == NULL:
            return SCAN_MALFORMED
        if number == 1 and kind == 2:       # the last one holds, as in protobuf; a request is declined
            is_plain[0] = is_plain[0] and tensor.name.data == NULL
            tensor.name = field
        elif number == 2 and kind == 2:
            is_plain[0] = is_plain[0] and tensor.datatype.data == NULL
            tensor.datatype = field
        elif number == 3 and kind == 2:
            inner, inner_end = field.data, field.data + field.size
            while inner < inner_end:
                inner = read_varint(inner, inner_end, &value)
                if inner == NULL:
                    return SCAN_MALFORMED
                if tensor.n_dims == MAX_DIMS:
                    is_plain[0] = False
                else:
                    tensor.dims[tensor.n_dims] = <int64_t> value
                    tensor.n_dims += 1
        elif number == 3 and kind == 0:
            if tensor.n_dims == MAX_DIMS:
                is_plain[0] = False
            else:
                tensor.dims[tensor.n_dims] = <int64_t> value
                tensor.n_dims += 1
        else:
            is_plain[0] = False
    return SCAN_OK


cdef ScanResult scan_parameter(Slice content, InferScan *scan) noexcept nogil:
    """One entry of the request's parameter map; only those that the queue understands are plain.

    triton_enable_empty_final_response is sent by Triton's C++ client on unary calls too and means nothing there.
    """
    cdef const uint8_t *at = content.data
    cdef const uint8_t *end = at + content.size
    cdef uint32_t number = 0, kind = 0, choice = 0
    cdef uint64_t value = 0
    cdef Slice key, field
    key.data = field.data = NULL
    key.size = field.size = 0
    cdef uint64_t number_value = 0
    cdef Slice inner
    cdef const uint8_t *end_of
    while at < end:
        at = read_field(at, end, &number, &kind, &value, &field)
        if at == NULL:
            return SCAN_MALFORMED
        if number == 1 and kind == 2 and key.data == NULL:
            key = field
        elif number == 2 and kind == 2:
            inner = field
            while inner.size:
                end_of = read_field(inner.data, inner.data + inner.size, &number, &kind, &value, &field)
                if end_of == NULL:
                    return SCAN_MALFORMED
                inner.size -= end_of - inner.data
                inner.data = end_of
                if choice or kind != 0:
                    scan.is_plain = False
                choice = number
                number_value = value
        else:
            scan.is_plain = False
    if is_named(&key, b"triton_enable_empty_final_response", 34) and choice == 1:
        return SCAN_OK
    # int64 (2) or uint64 (5): clients differ
    if is_named(&key, b"priority", 8) and (choice == 5 or choice == 2) and number_value <= 0x7FFFFFFFFFFFFFFFULL:
        scan.priority = number_value
    elif is_named(&key, b"timeout", 7) and choice == 2 and number_value <= 0x7FFFFFFFFFFFFFFFULL // 1000:
        scan.timeout_us = <int64_t> number_value
    else:
        scan.is_plain = False
    return SCAN_OK


cdef ScanResult scan_request(const uint8_t *message, size_t size, InferScan *scan) noexcept nogil:
    if scan_fields(message, size, scan) != SCAN_OK:
        return SCAN_MALFORMED
    join_contents(scan)
    return SCAN_OK


cdef ScanResult scan_parts(const uint8_t *head, size_t head_size, Slice tensor, InferScan *scan) noexcept nogil:
    if scan_fields(head, head_size, scan) != SCAN_OK:
        return SCAN_MALFORMED
    if scan.n_raw == MAX_TENSORS:
        scan.is_plain = False
    else:
        scan.raw[scan.n_raw] = tensor
        scan.n_raw += 1
    join_contents(scan)
    return SCAN_OK


cdef void join_contents(InferScan *scan) noexcept nogil:
    if scan.n_raw != scan.n_inputs:
        scan.is_plain = False
    for i in range(scan.n_inputs if scan.is_plain else 0):
        scan.inputs[i].data = scan.raw[i]


cdef ScanResult scan_fields(const uint8_t *message, size_t size, InferScan *scan) noexcept nogil:
    cdef const uint8_t *at = message
    cdef const uint8_t *end = message + size
    cdef const uint8_t *inner
    cdef uint32_t number = 0, kind = 0
    cdef uint64_t value = 0
    cdef Slice *text
    cdef Slice field
    field.data = NULL
    field.size = 0
    scan.model_name.data = scan.model_version.data = scan.id.data = NULL
    scan.model_name.size = scan.model_version.size = scan.id.size = 0
    scan.n_inputs = scan.n_raw = scan.n_outputs = 0
    scan.is_plain = True
    scan.priority = 0
    scan.timeout_us = 0
    while at < end:
        at = read_field(at, end, &number, &kind, &value, &field)
        if at == NULL:
            return SCAN_MALFORMED
        if kind != 2:
            scan.is_plain = False
        elif number <= 3:
            text = &scan.model_name if number == 1 else &scan.model_version if number == 2 else &scan.id
            # of a text that comes twice protobuf takes the last, and looks at each; an id must be UTF-8 to be echoed
            if text.data != NULL or (number == 3 and not is_ascii(&field)):
                scan.is_plain = False
            text[0] = field
        elif number == 4:
            if scan_parameter(field, scan) != SCAN_OK:
                return SCAN_MALFORMED
        elif number == 5:
            if scan.n_inputs == MAX_TENSORS:
                scan.is_plain = False
                continue
            if scan_tensor(field, &scan.inputs[scan.n_inputs], &scan.is_plain) != SCAN_OK:
                return SCAN_MALFORMED
            scan.n_inputs += 1
        elif number == 6:
            if scan.n_outputs == MAX_TENSORS:
                scan.is_plain = False
                continue
            scan.outputs[scan.n_outputs].data = NULL
            scan.outputs[scan.n_outputs].size = 0
            inner = field.data
            while inner < field.data + field.size:
                if scan.outputs[scan.n_outputs].data != NULL:
                    scan.is_plain = False
                inner = read_field(inner, field.data + field.size, &number, &kind, &value,
                                   &scan.outputs[scan.n_outputs])
                if inner == NULL:
                    return SCAN_MALFORMED
                if number != 1 or kind != 2:
                    scan.is_plain = False
            scan.n_outputs += 1
        elif number == 7:
            if scan.n_raw == MAX_TENSORS:
                scan.is_plain = False
                continue
            scan.raw[scan.n_raw] = field
            scan.n_raw += 1
        else:
            scan.is_plain = False
    return SCAN_OK


cdef size_t find_tensor(const uint8_t *head, size_t size, size_t message_size) noexcept nogil:
    cdef const uint8_t *at = head
    cdef const uint8_t *end = head + size
    cdef uint64_t tag, length = 0
    while at < end:
        at = read_varint(at, end, &tag)
        if at == NULL:
            return 0
        if tag & 7 == 0 or tag & 7 == 2:
            at = read_varint(at, end, &length)
            if at == NULL:
                return 0
        else:
            return 0
        if tag & 7 == 2:
            if tag >> 3 == 7 and length >= message_size // 2:
                return <size_t> (at - head)
            if length > <uint64_t> (end - at):
                return 0
            at += length
    return 0


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


cdef inline bint skip_element(const uint8_t *data, size_t size, size_t *position) noexcept nogil:
    """Moves behind one BYTES element; False, and no move, where there is no whole one."""
    cdef size_t at = position[0]
    cdef size_t length
    if size - at < 4:
        return False
    length = data[at] | (<size_t> data[at + 1] << 8) | (<size_t> data[at + 2] << 16) | (<size_t> data[at + 3] << 24)
    if length > size - at - 4:
        return False
    position[0] = at + 4 + length
    return True


cdef bint check_bytes_elements(const uint8_t *data, size_t size, int64_t count) noexcept nogil:
    cdef size_t at = 0
    while count > 0:
        if not skip_element(data, size, &at):
            return False
        count -= 1
    return at == size


# ---- for Python callers

cdef bytes to_bytes(const Slice *text):
    return PyBytes_FromStringAndSize(<const char *> text.data, <Py_ssize_t> text.size)


def scan(const uint8_t[::1] message not None):
    """What the compiled path sees in a serialized ModelInferRequest, as a dict; ValueError if it is malformed.

    For tests and tools: names, datatypes and raw contents are ``bytes``.
    """
    cdef InferScan found
    cdef const uint8_t *data = &message[0] if message.shape[0] else NULL
    if scan_request(data, <size_t> message.shape[0], &found) != SCAN_OK:
        raise ValueError("not a serialized ModelInferRequest")
    return {
        "is_plain": bool(found.is_plain),
        "model_name": to_bytes(&found.model_name),
        "model_version": to_bytes(&found.model_version),
        "id": to_bytes(&found.id),
        "priority": found.priority,
        "timeout_us": found.timeout_us,
        "inputs": [
            (
                to_bytes(&found.inputs[i].name),
                to_bytes(&found.inputs[i].datatype),
                tuple(found.inputs[i].dims[k] for k in range(found.inputs[i].n_dims)),
                to_bytes(&found.inputs[i].data),
            )
            for i in range(found.n_inputs)
        ],
        "outputs": [to_bytes(&found.outputs[i]) for i in range(found.n_outputs)],
    }


def walk_elements(const uint8_t[::1] data not None, int64_t limit):
    """``(found, at)``: how many whole BYTES elements ``data`` begins with, at most ``limit``, and where they end."""
    cdef const uint8_t *start = &data[0] if data.shape[0] else NULL
    cdef size_t size = <size_t> data.shape[0]
    cdef size_t at = 0
    cdef int64_t found = 0
    with nogil:
        while found < limit and skip_element(start, size, &at):
            found += 1
    return found, at


cdef bytes encode_varint(uint64_t value):
    cdef uint8_t buffer[10]
    cdef uint8_t *end = put_varint(buffer, value)
    return PyBytes_FromStringAndSize(<const char *> buffer, end - buffer)


cdef bytes encode_field(uint8_t tag, object content):
    return bytes((tag,)) + encode_varint(<uint64_t> len(content)) + content


def encode_request(str name, str version, str id, inputs, outputs=()):
    """A serialized ModelInferRequest with raw contents.

    ``inputs`` are ``(name, datatype, shape, buffer)``, ``outputs`` the names of the wanted outputs (none: all).
    """
    cdef list parts = [encode_field(0x0A, name.encode())]
    cdef list raw = []
    if version:
        parts.append(encode_field(0x12, version.encode()))
    if id:
        parts.append(encode_field(0x1A, id.encode()))
    for tensor_name, datatype, shape, data in inputs:
        dims = b"".join([encode_varint(<uint64_t> <int64_t> dim) for dim in shape])
        tensor = encode_field(0x0A, tensor_name.encode()) + encode_field(0x12, datatype.encode())
        if dims:
            tensor += encode_field(0x1A, dims)
        parts.append(encode_field(0x2A, tensor))
        view = memoryview(data).cast("B")
        raw.append(b"\x3a" + encode_varint(<uint64_t> view.nbytes))
        raw.append(view)
    for output in outputs:
        parts.append(encode_field(0x32, encode_field(0x0A, output.encode())))
    parts.extend(raw)
    return b"".join(parts)


def encode_parameters(parameters not None):
    """The field `parameters` of a ModelInferResponse: bool, int, float or str by name; TypeError for anything else."""
    cdef list parts = []
    for name, value in parameters.items():
        if isinstance(value, bool):
            choice = b"\x08\x01" if value else b"\x08\x00"
        elif isinstance(value, int):
            if -(1 << 63) <= value < 1 << 63:
                choice = b"\x10" + encode_varint(<uint64_t> <int64_t> value)
            else:
                choice = b"\x28" + encode_varint(<uint64_t> value)
        elif isinstance(value, float):
            choice = b"\x21" + struct.pack("<d", value)
        elif isinstance(value, str):
            choice = encode_field(0x1A, value.encode())
        else:
            raise TypeError(f"parameter '{name}' is a {type(value).__name__}; bool, int, float and str can be sent")
        parts.append(encode_field(0x22, encode_field(0x0A, name.encode()) + encode_field(0x12, choice)))
    return b"".join(parts)


def decode_response(message not None):
    """``(name, version, id, outputs)`` of a ModelInferResponse; outputs are ``(name, datatype, shape, memoryview)``.

    The views keep ``message`` alive. ValueError if the bytes are not such a response with one raw content per output.
    """
    cdef Py_buffer buffer
    whole = memoryview(message)
    PyObject_GetBuffer(whole, &buffer, PyBUF_SIMPLE)
    cdef const uint8_t *start = <const uint8_t *> buffer.buf
    cdef const uint8_t *at = start
    cdef const uint8_t *end = at + buffer.len
    PyBuffer_Release(&buffer)   # `whole` holds the memory
    cdef uint32_t number = 0, kind = 0
    cdef uint64_t value = 0
    cdef Slice field
    cdef TensorView tensor
    cdef bint is_plain = True
    field.data = NULL
    field.size = 0
    name = version = id = ""
    heads = []
    raw = []
    while at < end:
        at = read_field(at, end, &number, &kind, &value, &field)
        if at == NULL:
            raise ValueError("not a serialized ModelInferResponse")
        if kind != 2:
            continue
        if number == 1:
            name = to_bytes(&field).decode()
        elif number == 2:
            version = to_bytes(&field).decode()
        elif number == 3:
            id = to_bytes(&field).decode()
        elif number == 5:
            if scan_tensor(field, &tensor, &is_plain) != SCAN_OK:
                raise ValueError("not a serialized ModelInferResponse")
            heads.append((
                to_bytes(&tensor.name).decode(),
                to_bytes(&tensor.datatype).decode(),
                tuple([tensor.dims[k] for k in range(tensor.n_dims)]),
            ))
        elif number == 6:
            raw.append(whole[field.data - start:field.data - start + field.size])
    if len(raw) != len(heads):
        raise ValueError(f"a response with {len(heads)} outputs holds {len(raw)} raw contents")
    return name, version, id, [(*head, data) for head, data in zip(heads, raw)]
