"""The V2 wire format for Python callers: requests written, responses read, parameters encoded."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint32_t, uint64_t

from aiorch_server._core.wire cimport Slice, put_varint
from aiorch_server._core.wire_request cimport (
    SCAN_OK,
    InferScan,
    TensorView,
    read_field,
    scan_request,
    scan_tensor,
    skip_element,
)

import struct


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
                tuple([found.inputs[i].dims[k] for k in range(found.inputs[i].n_dims)]),
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
