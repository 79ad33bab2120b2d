"""Requests that cannot be part of a sequence, in Triton's words; nothing of them stays behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.http as triton_http
from running_site import TIMEOUT_S
from sequence_models import StatefulSite
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

PREFIX = "[request id: r] "
NO_ID = "inference request to model 'oldest' must specify a non-zero or non-empty correlation ID"


@pytest.fixture(scope="module")
def stub(stateful: StatefulSite) -> Iterator[Any]:
    with grpc.insecure_channel(stateful.target) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def build(model: str = "oldest", rows: int = 1, **parameters: tuple[str, Any]) -> Any:
    """``sequence_id=("int64_param", 5)``."""
    request = pb.ModelInferRequest(model_name=model, id="r")
    request.inputs.add(name="value", datatype="INT64", shape=[rows, 1])
    request.raw_input_contents.append(np.ones(rows, np.int64).tobytes())
    for name, (kind, value) in parameters.items():
        setattr(request.parameters[name], kind, value)
    return request


ID = ("int64_param", 5)
YES = ("bool_param", True)
CASES = {
    "no start": (build(sequence_id=ID), "inference request for sequence 5 to model 'oldest' must specify the START "
                 "flag on the first request of the sequence"),
    "end only": (build(sequence_id=ID, sequence_end=YES), "inference request for sequence 5 to model 'oldest' must "
                 "specify the START flag on the first request of the sequence"),
    "no start, text": (build("oldest_text", sequence_id=("string_param", "née")), "inference request for sequence née "
                       "to model 'oldest_text' must specify the START flag on the first request of the sequence"),
    "no id": (build(sequence_start=YES), NO_ID),
    "no parameter": (build(), NO_ID),
    "zero": (build(sequence_id=("int64_param", 0), sequence_start=YES), NO_ID),
    "unsigned zero": (build(sequence_id=("uint64_param", 0), sequence_start=YES), NO_ID),
    "empty": (build(sequence_id=("string_param", ""), sequence_start=YES), NO_ID),
    "two rows": (build(rows=2, sequence_id=ID, sequence_start=YES), "inference request to model 'oldest' must specify "
                 "batch-size 1 due to requirements of sequence batcher"),
    "too many rows": (build(rows=9, sequence_id=ID, sequence_start=YES), "inference request batch-size must be <= 4 "
                      "for 'oldest'"),
    "text for a number": (build(sequence_id=("string_param", "5"), sequence_start=YES), "inference request to model "
                          "'oldest': the model takes correlation IDs as UINT64, a string is none"),
    "too large": (build("oldest_int32", sequence_id=("int64_param", 2**31), sequence_start=YES), "inference request to "
                  "model 'oldest_int32': the model takes correlation IDs as INT32, 2147483648 does not fit"),
    "too long": (build("oldest_text", sequence_id=("string_param", "a" * 129), sequence_start=YES), "string "
                 "correlation ID cannot be longer than 128 bytes"),
}  # fmt: skip
# what is wrong already in the parameters is told to every model
TYPES = {
    "id is a flag": ({"sequence_id": ("bool_param", True)}, "invalid value type for 'sequence_id' parameter, expected "
                     "int64_param or string_param."),
    "id is a fraction": ({"sequence_id": ("double_param", 1.0)}, "invalid value type for 'sequence_id' parameter, "
                         "expected int64_param or string_param."),
    "start is a number": ({"sequence_id": ID, "sequence_start": ("int64_param", 1)}, "invalid value type for "
                          "'sequence_start' parameter, expected bool_param."),
    "end is a text": ({"sequence_id": ID, "sequence_end": ("string_param", "true")}, "invalid value type for "
                      "'sequence_end' parameter, expected bool_param."),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_over_grpc(stateful: StatefulSite, stub: Any, case: str) -> None:
    request, text = CASES[case]
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request, timeout=TIMEOUT_S)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, PREFIX + text)
    assert stateful.count(request.model_name) == {"live": 0, "backlog": 0, "waiting": 0}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_a_stream(stateful: StatefulSite, stub: Any, case: str) -> None:
    """The stream goes on."""
    request, text = CASES[case]
    good = build(sequence_id=ID, sequence_start=YES, sequence_end=YES)
    bad, answer = stub.ModelStreamInfer(iter([request, good]), timeout=TIMEOUT_S)
    assert bad.error_message == PREFIX + text
    assert not answer.error_message
    assert stateful.count(request.model_name) == {"live": 0, "backlog": 0, "waiting": 0}


@pytest.mark.parametrize("case", TYPES)
def test_parameters_of_wrong_types(stub: Any, case: str) -> None:
    parameters, text = TYPES[case]
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(build(**parameters), timeout=TIMEOUT_S)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, PREFIX + text)


@pytest.mark.parametrize(
    ("sequence_id", "flags", "text"),
    [
        (5, {}, "must specify the START flag on the first request of the sequence"),
        (2**64, {"sequence_start": True}, "sequence_id: a number of 65 bits does not fit into 64 bits"),
        ("5", {"sequence_start": True}, "the model takes correlation IDs as UINT64, a string is none"),
    ],
)
def test_refused_over_http(stateful: StatefulSite, sequence_id: Any, flags: dict[str, bool], text: str) -> None:
    tensor = triton_http.InferInput("value", [1, 1], "INT64")
    tensor.set_data_from_numpy(np.ones((1, 1), np.int64))
    with triton_http.InferenceServerClient(stateful.http) as client, pytest.raises(InferenceServerException) as caught:
        client.infer("oldest", [tensor], sequence_id=sequence_id, **flags)
    assert caught.value.status() == "400"
    assert text in str(caught.value)
    assert stateful.count("oldest") == {"live": 0, "backlog": 0, "waiting": 0}


def test_nothing_may_follow_the_end(stub: Any) -> None:
    stub.ModelInfer(build(sequence_id=ID, sequence_start=YES, sequence_end=YES), timeout=TIMEOUT_S)
    with pytest.raises(grpc.RpcError, match="must specify the START flag"):
        stub.ModelInfer(build(sequence_id=ID), timeout=TIMEOUT_S)


def test_numbers_and_texts_are_different_sequences(stub: Any) -> None:
    text_of_five = ("string_param", "5")
    stub.ModelInfer(build("oldest_text", sequence_id=ID, sequence_start=YES), timeout=TIMEOUT_S)
    with pytest.raises(grpc.RpcError, match="must specify the START flag"):
        stub.ModelInfer(build("oldest_text", sequence_id=text_of_five), timeout=TIMEOUT_S)
    stub.ModelInfer(build("oldest_text", sequence_id=ID, sequence_end=YES), timeout=TIMEOUT_S)


def test_unsigned_numbers_may_come_signed(stub: Any) -> None:
    """Clients put 64 bits into whichever parameter they have."""
    signed, unsigned = ("int64_param", -1), ("uint64_param", 2**64 - 1)
    stub.ModelInfer(build(sequence_id=signed, sequence_start=YES), timeout=TIMEOUT_S)
    answer = stub.ModelInfer(build(sequence_id=unsigned, sequence_end=YES), timeout=TIMEOUT_S)
    totals = dict(zip([output.name for output in answer.outputs], answer.raw_output_contents, strict=True))
    assert np.frombuffer(totals["total"], np.int64).item() == 2


def test_state_is_not_for_clients(stub: Any) -> None:
    request = build(sequence_id=ID, sequence_start=YES)
    request.outputs.add(name="sum_out")
    with pytest.raises(grpc.RpcError, match="unexpected inference output 'sum_out' for model 'oldest'"):
        stub.ModelInfer(request, timeout=TIMEOUT_S)
    request = build(sequence_id=ID, sequence_start=YES)
    request.inputs.add(name="sum_in", datatype="INT64", shape=[1, 1])
    request.raw_input_contents.append(bytes(8))
    with pytest.raises(grpc.RpcError, match="unexpected inference input 'sum_in' for model 'oldest'"):
        stub.ModelInfer(request, timeout=TIMEOUT_S)


def test_what_the_server_tells(stub: Any) -> None:
    """perf_analyzer reads these before it sends sequences."""
    assert "sequence" in stub.ServerMetadata(pb.ServerMetadataRequest()).extensions
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="direct"))
    assert [tensor.name for tensor in metadata.inputs] == ["value"]
    assert [tensor.name for tensor in metadata.outputs] == ["total", "signals"]
    config = stub.ModelConfig(pb.ModelConfigRequest(name="direct")).config
    assert config.WhichOneof("scheduling_choice") == "sequence_batching"
    assert [tensor.name for tensor in config.input] == ["value"]
    assert config.sequence_batching.WhichOneof("strategy_choice") == "direct"
    assert [each.name for each in config.sequence_batching.control_input] == ["start", "end", "ready", "corrid"]
    assert config.sequence_batching.state[0].output_name == "sum_out"
    assert not stub.ModelConfig(pb.ModelConfigRequest(name="oldest")).config.HasField("dynamic_batching")
