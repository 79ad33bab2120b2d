"""Protobuf to neutral values: what is refused, in which words, and what typed contents become."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorch_server import errors, types
from aiorch_server.frontends.grpc import convert


def build(datatype: str = "FP32", shape: tuple[int, ...] = (1,), **contents: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m", id="7")
    tensor = request.inputs.add(name="A", datatype=datatype, shape=shape)
    if contents:
        tensor.contents.CopyFrom(pb.InferTensorContents(**contents))
    return request


def refuse(request: pb.ModelInferRequest, kind: type[errors.AiorchError] = errors.RequestError) -> str:
    with pytest.raises(kind) as caught:
        convert.decode_infer_request(request)
    assert type(caught.value) is kind
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "data", [b"\xff", b"\x0a\x05m", b"\x2a\x7f", b"\x0a\x01\xff", b"\x00", b"\x3a\xff\xff\xff\xff\x0f"]
)
def test_malformed_bytes(data: bytes) -> None:
    with pytest.raises(errors.RequestError, match=f"the {len(data)} bytes .* not a valid ModelInferRequest message"):
        convert.parse_message(pb.ModelInferRequest, data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(errors.RequestError):
        convert.decode_infer_request(convert.parse_message(pb.ModelInferRequest, data))


def test_typed_and_raw() -> None:
    request = build(fp32_contents=[1.0])
    request.raw_input_contents.append(b"1234")
    assert refuse(request) == (
        "contents field must not be specified when using raw_input_contents for 'A' for model 'm'"
    )


def test_empty_contents_beside_raw() -> None:
    request = build()
    request.inputs[0].contents.SetInParent()
    request.raw_input_contents.append(b"1234")
    assert "contents field must not be specified" in refuse(request)


def test_no_data() -> None:
    assert refuse(build()) == "unable to find data for input tensor 'A' for model 'm' in request."


def test_fewer_raw_than_inputs() -> None:
    request = build()
    request.inputs.add(name="B", datatype="FP32", shape=[1])
    request.raw_input_contents.append(b"1234")
    assert refuse(request) == "unable to find data for input tensor 'B' for model 'm' in request."


def test_more_raw_than_inputs() -> None:
    request = build()
    request.raw_input_contents.extend([b"1234", b"5678"])
    assert refuse(request).startswith("expected 1 raw_input_contents but got 2 for model 'm'")


def test_raw_without_inputs() -> None:
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"1"])
    assert refuse(request).startswith("expected 0 raw_input_contents but got 1")


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_raw_only_types(datatype: str) -> None:
    text = refuse(build(datatype, fp32_contents=[1.0]))
    assert text == (
        f"data-type '{datatype}' of inference input 'A' for model 'm' has no typed contents, use raw_input_contents"
    )


def test_unknown_type_with_contents() -> None:
    assert "unknown data-type 'FP33', expected one of BOOL, UINT8" in refuse(build("FP33", fp32_contents=[1.0]))


@pytest.mark.parametrize(
    ("datatype", "contents", "expected", "got"),
    [
        ("FP32", {"int_contents": [1]}, "fp32_contents", "int_contents"),
        ("INT64", {"int_contents": [1]}, "int64_contents", "int_contents"),
        ("BYTES", {"fp64_contents": [1.0]}, "bytes_contents", "fp64_contents"),
        ("BOOL", {"bool_contents": [True], "uint_contents": [1]}, "bool_contents", "uint_contents"),
    ],
)
def test_contents_of_another_type(datatype: str, contents: dict[str, Any], expected: str, got: str) -> None:
    text = refuse(build(datatype, **contents))
    assert text == (
        f"unexpected explicit tensor data for input tensor 'A' for model 'm': data-type '{datatype}' is expected in "
        f"{expected}, got {got}"
    )


@pytest.mark.parametrize(
    ("datatype", "field", "value", "limits"),
    [
        ("INT8", "int_contents", 128, "-128 to 127"),
        ("INT8", "int_contents", -129, "-128 to 127"),
        ("INT16", "int_contents", 40_000, "-32768 to 32767"),
        ("UINT8", "uint_contents", 256, "0 to 255"),
        ("UINT16", "uint_contents", 65_536, "0 to 65535"),
    ],
)
def test_values_that_do_not_fit(datatype: str, field: str, value: int, limits: str) -> None:
    text = refuse(build(datatype, (2,), **{field: [1, value]}))
    assert text == f"value {value} of input 'A' for model 'm' does not fit data-type '{datatype}', expected {limits}"


def test_parameter_without_value() -> None:
    request = build(fp32_contents=[1.0])
    request.parameters["priority"].SetInParent()
    assert refuse(request).startswith("parameter 'priority' of the request for model 'm' has no value")
    request = build(fp32_contents=[1.0])
    request.inputs[0].parameters["x"].SetInParent()
    assert refuse(request).startswith("parameter 'x' of input 'A' for model 'm' has no value")
    request = build(fp32_contents=[1.0])
    request.outputs.add(name="O").parameters["classification"].SetInParent()
    assert refuse(request).startswith("parameter 'classification' of output 'O' for model 'm' has no value")


def test_contents_beside_shared_memory() -> None:
    request = build(fp32_contents=[1.0])
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    assert refuse(request) == (
        "unexpected 'content' provided when using shared memory for input tensor 'A' for model 'm'"
    )


@pytest.mark.parametrize("field", ["inputs", "outputs", "raw_input_contents", "parameters", "shape"])
def test_too_many_of_anything(field: str) -> None:
    request = build(fp32_contents=[1.0])
    count = convert.MAX_ELEMENTS + 1
    if field == "parameters":
        for index in range(count):
            request.parameters[str(index)].bool_param = True
    elif field == "shape":
        request.inputs[0].shape.extend([1] * count)
    elif field == "raw_input_contents":
        request.raw_input_contents.extend([b""] * count)
    else:
        for _ in range(count):
            getattr(request, field).add()
    assert f"expected at most {convert.MAX_ELEMENTS}" in refuse(request, errors.PayloadTooLarge)


# --------------------------------------------------------------------------------------------------------- accepted

CASES = [
    ("BOOL", "bool_contents", [True, False, True], np.array([1, 0, 1], "?")),
    ("UINT8", "uint_contents", [0, 255], np.array([0, 255], "u1")),
    ("UINT16", "uint_contents", [0, 65535], np.array([0, 65535], "<u2")),
    ("UINT32", "uint_contents", [0, 2**32 - 1], np.array([0, 2**32 - 1], "<u4")),
    ("UINT64", "uint64_contents", [0, 2**64 - 1], np.array([0, 2**64 - 1], "<u8")),
    ("INT8", "int_contents", [-128, 127], np.array([-128, 127], "i1")),
    ("INT16", "int_contents", [-32768, 32767], np.array([-32768, 32767], "<i2")),
    ("INT32", "int_contents", [-(2**31), 2**31 - 1], np.array([-(2**31), 2**31 - 1], "<i4")),
    ("INT64", "int64_contents", [-(2**63), 2**63 - 1], np.array([-(2**63), 2**63 - 1], "<i8")),
    ("FP32", "fp32_contents", [1.5, float("inf"), -0.0], np.array([1.5, np.inf, -0.0], "<f4")),
    ("FP64", "fp64_contents", [1e300, -2.5], np.array([1e300, -2.5], "<f8")),
]


@pytest.mark.parametrize(("datatype", "field", "values", "expected"), CASES, ids=[case[0] for case in CASES])
def test_typed_becomes_raw(datatype: str, field: str, values: list[Any], expected: Any) -> None:
    request = convert.decode_infer_request(build(datatype, (len(values),), **{field: values}))
    assert request.inputs[0].data == expected.tobytes()
    assert (request.inputs[0].datatype, request.inputs[0].shape) == (datatype, (len(values),))


def test_every_datatype_is_decided() -> None:
    covered = {case[0] for case in CASES} | {"BYTES", "FP16", "BF16"}
    assert covered == {member.value for member in types.DataType}


def test_typed_bytes() -> None:
    request = convert.decode_infer_request(build("BYTES", (3,), bytes_contents=[b"ab", b"", b"\xff" * 300]))
    assert request.inputs[0].data == b"\x02\0\0\0ab" + b"\0\0\0\0" + b"\x2c\x01\0\0" + b"\xff" * 300


def test_typed_empty_tensor() -> None:
    message = build("FP32", (0,))
    message.inputs[0].contents.SetInParent()
    assert convert.decode_infer_request(message).inputs[0].data == b""


def test_contents_longer_than_one_step() -> None:
    values = np.arange(150_000, dtype="<i4")
    request = convert.decode_infer_request(build("INT32", (150_000,), int_contents=values.tolist()))
    assert request.inputs[0].data == values.tobytes()


def test_everything_else_of_a_request() -> None:
    message = pb.ModelInferRequest(model_name="m", model_version="3", id="x")
    message.parameters["flag"].bool_param = False
    message.parameters["timeout"].int64_param = -5
    message.parameters["name"].string_param = ""
    message.parameters["ratio"].double_param = 0.5
    message.parameters["priority"].uint64_param = 2**64 - 1
    message.inputs.add(name="A", datatype="FP16", shape=[2, -1])
    shared = message.inputs.add(name="S", datatype="FP32", shape=[1])
    shared.parameters["shared_memory_region"].string_param = "r"
    message.inputs.add(name="B", datatype="whatever", shape=[])
    message.raw_input_contents.extend([b"aa", b""])
    message.outputs.add(name="O").parameters["classification"].int64_param = 3
    request = convert.decode_infer_request(message)
    assert request == types.InferenceRequest(
        "m",
        "3",
        [
            types.Tensor("A", "FP16", (2, -1), b"aa"),
            types.Tensor("S", "FP32", (1,), None, {"shared_memory_region": "r"}),
            types.Tensor("B", "whatever", (), b""),
        ],
        [types.RequestedOutput("O", {"classification": 3})],
        "x",
        {"flag": False, "timeout": -5, "name": "", "ratio": 0.5, "priority": 2**64 - 1},
    )
    assert request.parameters["flag"] is False


def test_response_is_raw_and_in_order() -> None:
    message = convert.encode_infer_response(
        types.InferenceResponse(
            "m",
            "3",
            [
                types.Tensor("A", "FP32", (1,), memoryview(b"1234")),
                types.Tensor("S", "FP32", (1,), None, {"shared_memory_region": "r"}),
                types.Tensor("B", "BYTES", (0, 2), b""),
            ],
            "x",
            {"a": True, "b": -1, "c": 1.5, "d": "t", "e": 2**63},
        )
    )
    assert list(message.raw_output_contents) == [b"1234", b"", b""]
    assert [(t.name, t.datatype, list(t.shape)) for t in message.outputs] == [
        ("A", "FP32", [1]),
        ("S", "FP32", [1]),
        ("B", "BYTES", [0, 2]),
    ]
    assert not any(tensor.HasField("contents") for tensor in message.outputs)
    choices = {name: parameter.WhichOneof("parameter_choice") for name, parameter in message.parameters.items()}
    assert choices == {
        "a": "bool_param",
        "b": "int64_param",
        "c": "double_param",
        "d": "string_param",
        "e": "uint64_param",
    }
    assert (message.model_name, message.model_version, message.id) == ("m", "3", "x")


def test_config() -> None:
    message = convert.encode_model_config(
        {"name": "m", "max_batch_size": 4, "input": [{"name": "A", "data_type": "TYPE_BF16", "dims": ["-1", 2**40]}]}
    )
    assert list(message.config.input[0].dims) == [-1, 2**40]
    assert message.config.input[0].data_type == 14


# ----------------------------------------------------------------------------------------------- repository parameters


def parameters(**values: Any) -> Any:
    request = pb.RepositoryModelLoadRequest()
    for name, value in values.items():
        field = {str: "string_param", bytes: "bytes_param", bool: "bool_param", int: "int64_param"}[type(value)]
        setattr(request.parameters[name], field, value)
    return request.parameters


def test_load_parameters() -> None:
    assert convert.decode_load_parameters(parameters(), "m") == (None, {})
    assert convert.decode_load_parameters(parameters(**{"config": "{}", "file:1/model.onnx": b"x"}), "m") == (
        "{}",
        {"1/model.onnx": b"x"},
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"file:1/model.onnx": b"x"}, "needs the parameter 'config' as well"),
        ({"config": b"{}"}, "invalid value type for load parameter 'config', expected string_param, got bytes_param"),
        ({"config": "{}", "file:1/a": "x"}, "load parameter 'file:1/a', expected bytes_param, got string_param"),
        ({"colour": "red"}, "unrecognized load parameter 'colour'"),
    ],
)
def test_bad_load_parameters(values: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.RequestError, match=text):
        convert.decode_load_parameters(parameters(**values), "m")


def test_unload_parameters() -> None:
    assert convert.decode_unload_parameters(parameters()) is False
    assert convert.decode_unload_parameters(parameters(unload_dependents=True)) is True
    with pytest.raises(errors.RequestError, match="expected bool_param, got int64_param"):
        convert.decode_unload_parameters(parameters(unload_dependents=1))
    with pytest.raises(errors.RequestError, match="unrecognized unload parameter 'x'"):
        convert.decode_unload_parameters(parameters(x=True))
