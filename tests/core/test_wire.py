"""The scanner and the encoder against protobuf's own."""

from __future__ import annotations

import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from aiorch_server._core import decode_response, encode_request, scan

ascii_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12)
dims = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8)
parameters = st.dictionaries(
    st.sampled_from(["priority", "timeout", "triton_enable_empty_final_response", "sequence_id", "mine"]),
    st.one_of(
        st.builds(lambda v: pb.InferParameter(int64_param=v), st.integers(-(2**63), 2**63 - 1)),
        st.builds(lambda v: pb.InferParameter(uint64_param=v), st.integers(0, 2**64 - 1)),
        st.builds(lambda v: pb.InferParameter(bool_param=v), st.booleans()),
        st.builds(lambda v: pb.InferParameter(string_param=v), ascii_text),
        st.builds(lambda v: pb.InferParameter(double_param=v), st.floats(allow_nan=False)),
    ),
    max_size=3,
)


@st.composite
def requests(draw: st.DrawFn) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=draw(ascii_text), model_version=draw(ascii_text), id=draw(ascii_text))
    for _ in range(draw(st.integers(0, 4))):
        request.inputs.add(name=draw(ascii_text), datatype=draw(ascii_text), shape=draw(dims))
        request.raw_input_contents.append(draw(st.binary(max_size=40)))
    for _ in range(draw(st.integers(0, 3))):
        request.outputs.add(name=draw(ascii_text))
    return request


@given(requests())
def test_plain_requests_are_read_as_protobuf_reads_them(request_: pb.ModelInferRequest) -> None:
    found = scan(request_.SerializeToString())
    assert found["is_plain"]
    assert found["model_name"].decode() == request_.model_name
    assert found["model_version"].decode() == request_.model_version
    assert found["id"].decode() == request_.id
    assert found["outputs"] == [output.name.encode() for output in request_.outputs]
    assert found["inputs"] == [
        (tensor.name.encode(), tensor.datatype.encode(), tuple(tensor.shape), raw)
        for tensor, raw in zip(request_.inputs, request_.raw_input_contents, strict=True)
    ]


@given(requests(), parameters)
def test_only_the_queues_parameters_are_plain(
    request_: pb.ModelInferRequest, given_: dict[str, pb.InferParameter]
) -> None:
    for name, value in given_.items():
        request_.parameters[name].CopyFrom(value)
    found = scan(request_.SerializeToString())

    def is_plain(name: str, value: pb.InferParameter) -> bool:
        kind = value.WhichOneof("parameter_choice")
        if name == "priority":
            return (kind == "uint64_param" and value.uint64_param < 2**63) or (
                kind == "int64_param" and value.int64_param >= 0
            )
        if name == "timeout":
            return kind == "int64_param" and 0 <= value.int64_param <= (2**63 - 1) // 1000
        return name == "triton_enable_empty_final_response" and kind == "bool_param"

    assert found["is_plain"] == all(is_plain(name, value) for name, value in given_.items())
    if found["is_plain"]:
        priority = given_.get("priority", pb.InferParameter())
        assert found["priority"] == (priority.uint64_param or priority.int64_param)
        assert found["timeout_us"] == given_.get("timeout", pb.InferParameter()).int64_param


@given(st.binary(max_size=200))
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
@example(b"\x2a\x03\x1a\x05\x01")
@example(b"\x08" + b"\xff" * 10)
def test_random_bytes_never_disagree_with_protobuf(data: bytes) -> None:
    agree(data)


@given(requests(), st.data())
def test_damaged_requests_never_disagree_with_protobuf(request_: pb.ModelInferRequest, data: st.DataObject) -> None:
    whole = bytearray(request_.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        if whole:
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    agree(bytes(whole[: data.draw(st.integers(0, len(whole)))]))


def agree(data: bytes) -> None:
    """What the scanner calls plain must parse, and to the same values; anything else may be declined."""
    try:
        found = scan(data)
    except ValueError:
        return
    if not found["is_plain"]:
        return
    try:
        parsed = pb.ModelInferRequest.FromString(data)
    except Exception:
        # the one thing left to the comparison of names: text that is not UTF-8 equals no name of ours
        texts = [found["model_name"], found["model_version"], *found["outputs"]]
        texts += [text for tensor in found["inputs"] for text in tensor[:2]]
        assert any(not is_utf8(text) for text in texts), "plain, but protobuf refuses it"
        return
    assert found["model_name"].decode() == parsed.model_name
    assert found["id"].decode() == parsed.id
    assert [tensor[2] for tensor in found["inputs"]] == [tuple(tensor.shape) for tensor in parsed.inputs]
    assert [tensor[3] for tensor in found["inputs"]] == list(parsed.raw_input_contents)


def is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_what_is_not_plain() -> None:
    def scanned(**fields: object) -> bool:
        return scan(pb.ModelInferRequest(**fields).SerializeToString())["is_plain"]

    tensor = pb.ModelInferRequest.InferInputTensor
    assert scanned(inputs=[tensor(name="a")], raw_input_contents=[b""])
    assert not scanned(inputs=[tensor(name="a")])
    assert not scanned(raw_input_contents=[b""])
    assert not scanned(id="ü")
    assert not scanned(inputs=[tensor(shape=[1] * 9)], raw_input_contents=[b""])
    assert not scanned(inputs=[tensor(contents=pb.InferTensorContents())], raw_input_contents=[b""])
    typed = tensor(parameters={"shared_memory_region": pb.InferParameter(string_param="r")})
    assert not scanned(inputs=[typed], raw_input_contents=[b""])
    output = pb.ModelInferRequest.InferRequestedOutputTensor(
        parameters={"classification": pb.InferParameter(int64_param=1)}
    )
    assert not scanned(outputs=[output])
    assert not scanned(inputs=[tensor(name=str(i)) for i in range(65)], raw_input_contents=[b""] * 65)


@given(requests())
def test_encoded_requests_are_what_protobuf_would_write(request_: pb.ModelInferRequest) -> None:
    message = encode_request(
        request_.model_name,
        request_.model_version,
        request_.id,
        [
            (tensor.name, tensor.datatype, list(tensor.shape), raw)
            for tensor, raw in zip(request_.inputs, request_.raw_input_contents, strict=True)
        ],
        [output.name for output in request_.outputs],
    )
    assert pb.ModelInferRequest.FromString(message) == request_


@given(st.lists(st.tuples(ascii_text, ascii_text, dims, st.binary(max_size=30)), max_size=4), ascii_text)
def test_decoded_responses_are_what_protobuf_wrote(outputs: list[tuple[str, str, list[int], bytes]], id: str) -> None:
    response = pb.ModelInferResponse(model_name="m", model_version="1", id=id)
    for name, datatype, shape, raw in outputs:
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(raw)
    name, version, found_id, found = decode_response(response.SerializeToString())
    assert (name, version, found_id) == ("m", "1", id)
    assert [(n, d, list(s), bytes(r)) for n, d, s, r in found] == outputs


def test_damaged_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="not a serialized"):
        decode_response(b"\x0a\x05a")
    with pytest.raises(ValueError, match="1 outputs holds 0 raw"):
        decode_response(pb.ModelInferResponse(outputs=[pb.ModelInferResponse.InferOutputTensor()]).SerializeToString())


@pytest.mark.parametrize(
    "twice",
    [
        b"\x0a\x01\xff\x0a\x01m",
        b"\x12\x01\xff\x12\x011",
        b"\x1a\x01a\x1a\x01b",
        b"\x2a\x06\x0a\x01\xff\x0a\x01x\x3a\x00",
        b"\x2a\x06\x12\x01\xff\x12\x01x\x3a\x00",
        b"\x32\x06\x0a\x01\xff\x0a\x01y",
        b"\x22\x11\x0a\x01\xff\x0a\x08priority\x12\x02\x10\x01",
        b"\x22\x11\x0a\x08priority\x12\x05\x1a\x01\xff\x10\x01",
    ],
)
def test_texts_that_come_twice_are_for_protobuf(twice: bytes) -> None:
    """It takes the last, but refuses the whole for the first if that is no UTF-8."""
    assert not scan(twice)["is_plain"]


def test_tags_of_more_than_five_bytes_are_for_protobuf() -> None:
    long_tag = b"\x92\x80\x80\x80\x80\x00\x00"
    with pytest.raises(DecodeError):
        pb.ModelInferRequest.FromString(long_tag)
    with pytest.raises(ValueError, match="not a serialized ModelInferRequest"):
        scan(long_tag)
