"""Targets ``protobuf`` and ``response``: what the core reads, read by protobuf too."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t
from libc.stdio cimport fprintf, stderr
from libc.stdlib cimport abort

import traceback

from aiorch_proto.v2 import inference_pb2 as pb
from google.protobuf.message import DecodeError

from aiorch_server._core import decode_response, scan


def is_text(*values: bytes) -> bool:
    try:
        for value in values:
            value.decode()
    except UnicodeDecodeError:
        return False
    return True


def read_request(data: bytes) -> None:
    """A plain request says to protobuf what it says to the scanner."""
    try:
        found = scan(data)
    except ValueError:
        return
    if not found["is_plain"]:
        return
    names = [found["model_name"], found["model_version"], found["id"], *found["outputs"]]
    names += [name for tensor in found["inputs"] for name in tensor[:2]]
    try:
        read = pb.ModelInferRequest.FromString(data)
    except DecodeError:
        # names that are no text: a model of that name, a tensor of that name does not exist
        assert not is_text(*names), "the scanner takes what protobuf refuses"
        return
    assert found["model_name"] == read.model_name.encode()
    assert found["model_version"] == read.model_version.encode()
    assert found["id"] == read.id.encode()
    assert found["outputs"] == [output.name.encode() for output in read.outputs]
    assert found["inputs"] == [
        (tensor.name.encode(), tensor.datatype.encode(), tuple(tensor.shape), raw)
        for tensor, raw in zip(read.inputs, read.raw_input_contents, strict=True)
    ]
    assert not any(output.parameters for output in read.outputs)
    assert not any(tensor.parameters or tensor.HasField("contents") for tensor in read.inputs)
    assert set(read.parameters) <= {"priority", "timeout", "triton_enable_empty_final_response"}
    priority = read.parameters["priority"] if "priority" in read.parameters else pb.InferParameter()
    assert found["priority"] == (priority.uint64_param or priority.int64_param)
    timeout = read.parameters["timeout"].int64_param if "timeout" in read.parameters else 0
    assert found["timeout_us"] == timeout


def read_response(data: bytes) -> None:
    """What the client's reader accepts is what protobuf reads, wherever that reads anything."""
    try:
        name, version, id, outputs = decode_response(data)
    except ValueError:
        return
    try:
        read = pb.ModelInferResponse.FromString(data)
    except DecodeError:
        return      # it skips fields of the right number and the wrong kind, and parameters, without a look inside
    assert (name, version, id) == (read.model_name, read.model_version, read.id)
    assert [(output[0], output[1], bytes(output[3])) for output in outputs] == [
        (tensor.name, tensor.datatype, raw) for tensor, raw in zip(read.outputs, read.raw_output_contents, strict=True)
    ]
    for output, tensor in zip(outputs, read.outputs, strict=True):
        assert list(output[2]) == list(tensor.shape)[:8]


cdef void run_checked(object check, const uint8_t *data, size_t size):
    try:
        check(PyBytes_FromStringAndSize(<const char *> data, <Py_ssize_t> size))
    except BaseException:
        traceback.print_exc()
        fprintf(stderr, "broken: the core and protobuf do not agree\n")
        abort()


cdef int run_protobuf(const uint8_t *data, size_t size) noexcept with gil:
    run_checked(read_request, data, size)
    return 0


cdef int run_response(const uint8_t *data, size_t size) noexcept with gil:
    run_checked(read_response, data, size)
    return 0


TARGETS = {"protobuf": <size_t> &run_protobuf, "response": <size_t> &run_response}
