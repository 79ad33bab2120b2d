"""Ensembles with decoupled steps as they come and go: what is refused at load, and streams that are open meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ensemble_gates as gates
import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import InferenceStub
from decoupled_models import COUNT, SPREAD, write_decoupled
from ensembles import Wiring, write_ensemble, write_model
from patience import PATIENCE
from running_site import Site
from sequence_models import write_tally
from tritonclient.utils import InferenceServerException

TIMEOUT_S = 20.0 * PATIENCE
COUNTED: Wiring = ("count", {"X": "IN"}, {"Y": "t"})
DOUBLED: tuple[Wiring, ...] = (COUNTED, ("double", {"X": "t"}, {"Y": "OUT"}))
PLAIN: tuple[Wiring, ...] = (("double", {"X": "IN"}, {"Y": "OUT"}),)
HELD: tuple[Wiring, ...] = (COUNTED, ("held", {"X": "t"}, {"Y": "OUT"}))
BRANCHES: tuple[Wiring, ...] = (COUNTED, ("other", {"X": "IN"}, {"Y": "u"}))
UNLIKE = "which of their answers belong together is not defined"
ORIGINS = "receives inputs originated from different decoupled models"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_decoupled(tmp_path, "count", COUNT)
    write_decoupled(tmp_path, "other", SPREAD)
    write_model(tmp_path, "double")
    write_model(tmp_path, "join", "return {'Y': i['P'] + i['Q']}", inputs=("P", "Q"))
    write_model(tmp_path, "held", "gates.hold('held')\nreturn {'Y': i['X']}", before="import ensemble_gates as gates")
    return tmp_path


@pytest.fixture
def serve(root: Path) -> Iterator[Callable[..., Site]]:
    sites: list[Site] = []

    def start(**lifecycle: Any) -> Site:
        sites.append(Site(root, io_threads=1, lifecycle={"control_mode": "explicit", **lifecycle}))
        return sites[-1]

    yield start
    gates.open_gate("held")
    for site in sites:
        site.close()


def open_stream(channel: Any, model: str, n: int) -> Any:
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="IN", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(np.array([n, 1], np.float32).tobytes())
    return InferenceStub(channel).ModelStreamInfer(iter([request]), timeout=TIMEOUT_S)


def value_of(answer: Any) -> float:
    assert not answer.error_message, answer.error_message
    return float(np.frombuffer(answer.infer_response.raw_output_contents[0], np.float32)[0])


@pytest.mark.parametrize(
    ("steps", "more", "text"),
    [
        (
            (*BRANCHES, ("join", {"P": "t", "Q": "u"}, {"Y": "OUT"})),
            {},
            f"step of model 'join' {ORIGINS} (step 0, model 'count' and step 1, model 'other'): {UNLIKE}",
        ),
        (
            (COUNTED, ("other", {"X": "t"}, {"Y": "u"}), ("count", {"X": "t"}, {"Y": "v"}),
             ("join", {"P": "u", "Q": "v"}, {"Y": "OUT"})),
            {},
            f"step of model 'join' {ORIGINS} (step 1, model 'other' and step 2, model 'count'): {UNLIKE}",
        ),
        (
            (("count", {"X": "IN"}, {"Y": "A"}), ("other", {"X": "IN"}, {"Y": "B"})),
            {"outputs": ("A", "B")},
            "the outputs originate from different decoupled models (step 0, model 'count' and step 1, model 'other'): "
            f"{UNLIKE}",
        ),
        (
            DOUBLED,
            {"more": "model_transaction_policy { decoupled: false }"},
            "model_transaction_policy.decoupled is false, but count is decoupled, and so is the ensemble; write true",
        ),
        (
            PLAIN,
            {"more": "model_transaction_policy { decoupled: true }"},
            "model_transaction_policy.decoupled is true, but no model of its steps is decoupled; write false",
        ),
        (DOUBLED, {"more": "response_cache { enable: true }"}, "response_cache.enable is true, but count is decoupled"),
    ],
    ids=["join", "join_behind", "outputs", "false", "true", "cached"],
)  # fmt: skip
def test_what_is_not_defined_or_contradicts_is_refused_at_load(
    root: Path, steps: Any, more: dict[str, Any], text: str
) -> None:
    write_ensemble(root, "e", steps, **more)
    site = Site(root, io_threads=1, lifecycle={"control_mode": "explicit"}, cache={"kind": "local"})
    try:
        with triton.InferenceServerClient(site.target) as client:
            with pytest.raises(InferenceServerException) as caught:
                client.load_model("e")
            assert f"in ensemble e, {text}" in caught.value.message()
            assert not client.is_model_ready("e")
    finally:
        site.close()


def test_sequences_behind_a_decoupled_step_are_refused(root: Path, serve: Callable[..., Site]) -> None:
    write_tally(root, "tally")
    (root / "count" / "config.pbtxt").write_text(
        (root / "count" / "config.pbtxt").read_text().replace("TYPE_FP32 dims: [-1]", "TYPE_INT64 dims: [1]")
    )
    steps = (COUNTED, ("tally", {"value": "t"}, {"total": "OUT"}))
    write_ensemble(root, "e", steps, datatype="TYPE_INT64", dims="[1]", size=4)
    with (
        triton.InferenceServerClient(serve().target) as client,
        pytest.raises(InferenceServerException, match="model tally batches sequences and is run for each answer"),
    ):
        client.load_model("e")


def test_a_model_that_becomes_decoupled_withholds_the_ensemble(root: Path, serve: Callable[..., Site]) -> None:
    write_ensemble(root, "plain", PLAIN)
    write_ensemble(root, "doubled", DOUBLED, more="model_transaction_policy { decoupled: true }")
    with triton.InferenceServerClient(serve(load_models=("*",)).target) as client:
        write_decoupled(root, "double", SPREAD)
        (root / "count" / "config.pbtxt").write_text(
            (root / "count" / "config.pbtxt").read_text().replace("decoupled: true", "decoupled: false")
        )
        client.load_model("count")
        client.load_model("double")
        reasons = {each.name: each.reason for each in client.get_model_repository_index().models}
        assert reasons["plain"] == "in ensemble plain, model double is decoupled now; load the ensemble again"
        assert "in ensemble doubled, model count is not decoupled any more" in reasons["doubled"]
        client.load_model("plain")
        assert client.get_model_config("plain").config.model_transaction_policy.decoupled


@pytest.mark.parametrize("model", ["count", "held", "stream"])
def test_an_open_stream_is_finished_while_its_models_are_unloaded(
    root: Path, serve: Callable[..., Site], model: str
) -> None:
    write_ensemble(root, "stream", HELD, scheduling="max_inflight_requests: 1")
    site = serve(load_models=("*",))
    gates.shut("held")
    with triton.InferenceServerClient(site.target) as client, grpc.insecure_channel(site.target) as channel:
        answers = open_stream(channel, "stream", 20)
        gates.wait_entered("held")
        done = asyncio.run_coroutine_threadsafe(site.application.manager.unload(model), site.loop)
        until = time.monotonic() + TIMEOUT_S
        while client.is_model_ready("stream"):
            assert time.monotonic() < until
            time.sleep(0.002)
        gates.open_gate("held")
        assert [value_of(each) for each in answers] == list(range(20))
        done.result(TIMEOUT_S)


def test_what_does_not_end_within_the_grace_is_ended_with_its_reason(root: Path, serve: Callable[..., Site]) -> None:
    write_ensemble(root, "stream", HELD)
    site = serve(load_models=("*",), exit_timeout_secs=0.2)
    gates.shut("held")
    with triton.InferenceServerClient(site.target) as client, grpc.insecure_channel(site.target) as channel:
        answers = open_stream(channel, "stream", 20)
        gates.wait_entered("held")
        client.unload_model("stream")
        (last,) = answers
        assert "'stream' version 1 was unloaded before the request" in last.error_message
        assert last.infer_response.parameters["triton_final_response"].bool_param


def test_the_server_stops_while_a_stream_is_open(root: Path, serve: Callable[..., Site]) -> None:
    write_ensemble(root, "stream", HELD)
    site = serve(load_models=("*",))
    gates.shut("held")
    with grpc.insecure_channel(site.target) as channel:
        answers = open_stream(channel, "stream", 20)
        gates.wait_entered("held")
        stopping = site.begin_stop(TIMEOUT_S)
        until = time.monotonic() + TIMEOUT_S
        while not site.application.manager.is_stopping:
            assert time.monotonic() < until
            time.sleep(0.002)
        gates.open_gate("held")
        assert [value_of(each) for each in answers] == list(range(20))
        stopping.result(TIMEOUT_S)
