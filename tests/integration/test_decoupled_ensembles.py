"""Ensembles with decoupled steps on a running server: what is refused and what ends early first, then the answers."""

from __future__ import annotations

import asyncio
import json
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import decoupled_models as told
import ensemble_gates as gates
import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import InferenceStub
from decoupled_models import COUNT, SPREAD, write_decoupled
from ensembles import write_ensemble, write_model
from patience import PATIENCE
from running_site import Site
from tritonclient.utils import InferenceServerException

from aiorch_server.types import FINAL_RESPONSE, InferenceRequest, Tensor

TIMEOUT_S = 20.0 * PATIENCE
STALL_S = 0.5
#: Far more than what fits between a model and a client that does not read.
MANY, WIDE = 2_000, 20_000
GATES = "import ensemble_gates as gates"
PICKY = "if (i['X'] == 1).any():\n    raise ValueError('not 1')\nreturn {'Y': i['X'] + 100}"
FIRST_HELD = "(i['X'] == 0).any() and gates.hold('first')\nreturn {'Y': i['X']}"


@pytest.fixture(scope="module", params=["native", "grpcio"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("decoupled_ensembles")
    write_decoupled(root, "count", COUNT, "instance_group { count: 1 kind: KIND_CPU }")
    write_decoupled(root, "spread", SPREAD)
    write_decoupled(root, "other_count", COUNT)
    write_model(root, "double")
    write_model(root, "picky", PICKY)
    write_model(root, "first_held", FIRST_HELD, before=GATES, more="instance_group { count: 2 kind: KIND_CPU }")
    write_model(root, "held", "gates.hold('held')\nreturn {'Y': i['X']}", before=GATES)
    write_model(root, "join", "return {'Y': i['P'][:, :1] * 100 + i['Q'][:, :1]}", inputs=("P", "Q"))
    write_model(root, "spoil", "i['X'][:] = 0\nreturn {'Y': i['X']}")
    counted = ("count", {"X": "IN"}, {"Y": "t"})
    write_ensemble(root, "doubled", (counted, ("double", {"X": "t"}, {"Y": "OUT"})))
    write_ensemble(root, "choosy", (counted, ("picky", {"X": "t"}, {"Y": "OUT"})))
    write_ensemble(root, "ordered", (counted, ("first_held", {"X": "t"}, {"Y": "OUT"})))
    for name, limit in (("narrow", 3), ("one", 1)):
        steps = (counted, ("held", {"X": "t"}, {"Y": "OUT"}))
        write_ensemble(root, name, steps, scheduling=f"max_inflight_requests: {limit}")
    write_ensemble(root, "usual", (counted, ("held", {"X": "t"}, {"Y": "OUT"})))
    series = (counted, ("spread", {"X": "t"}, {"Y": "u"}), ("double", {"X": "u"}, {"Y": "OUT"}))
    write_ensemble(root, "series", series)
    write_ensemble(root, "one_series", series, scheduling="max_inflight_requests: 1")
    write_ensemble(root, "nested", (("doubled", {"IN": "IN"}, {"OUT": "t"}), ("spread", {"X": "t"}, {"Y": "OUT"})))
    with_before = (
        ("double", {"X": "IN"}, {"Y": "before"}),
        counted,
        ("join", {"P": "before", "Q": "t"}, {"Y": "OUT"}),
    )
    write_ensemble(root, "with_before", with_before, outputs=("OUT", "before"))
    shared = (counted, ("spoil", {"X": "IN"}, {"Y": "A"}), ("join", {"P": "IN", "Q": "t"}, {"Y": "OUT"}))
    write_ensemble(root, "shared", shared, outputs=("OUT", "A"))
    site = Site(root, io_threads=1, grpc={"transport": request.param}, limits={"stream_stall_secs": STALL_S})
    yield site
    site.close()


def make_input(n: float, width: float = 1) -> Any:
    tensor = triton.InferInput("IN", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.array([[n, width]], np.float32))
    return tensor


class Stream:
    """Triton's own client with an open stream."""

    def __init__(self, site: Site) -> None:
        self.client = triton.InferenceServerClient(site.target)
        self.answers: queue.Queue[Any] = queue.Queue()
        self.client.start_stream(lambda result, error: self.answers.put(error or result))

    def ask(
        self, model: str, n: float, width: float = 1, *, id: str = "", outputs: Any = None, **parameters: Any
    ) -> None:
        wanted = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
        self.client.async_stream_infer(
            model,
            [make_input(n, width)],
            request_id=id,
            outputs=wanted,
            parameters=parameters or None,
            enable_empty_final_response=True,
        )

    def read(self, output: str = "OUT") -> Any:
        """The first value of an answer, the text of an error, or None at the end."""
        answer = self.answers.get(timeout=TIMEOUT_S)
        if isinstance(answer, InferenceServerException):
            return answer.message()
        response = answer.get_response()
        if not response.outputs:
            assert response.parameters["triton_final_response"].bool_param
            return None
        return float(answer.as_numpy(output)[0, 0])

    def read_all(self, output: str = "OUT") -> list[Any]:
        """Everything up to the end."""
        return list(iter(lambda: self.read(output), None))

    def close(self) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()


@pytest.fixture
def stream(site: Site) -> Iterator[Stream]:
    stream = Stream(site)
    yield stream
    stream.close()


@pytest.fixture
def stub(site: Site) -> Iterator[Any]:
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(site.target, options=options) as channel:
        yield InferenceStub(channel)


def write_request(model: str, n: float, width: float = 1, id: str = "") -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, id=id)
    request.inputs.add(name="IN", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(np.array([n, width], np.float32).tobytes())
    return request


def find(site: Site, model: str) -> Any:
    return next(each for each in site.application.manager.servables() if each.name == model)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.002)


def is_quiet(site: Site) -> bool:
    """Whether nothing is queued, runs or is leased any more."""
    return all(each.scheduler.in_flight == 0 and each.leases == 0 for each in site.application.manager.servables())


# ------------------------------------------------------------------------------------------------- refused, ended


def test_one_answer_is_refused_where_there_are_many(site: Site, stream: Stream) -> None:
    with pytest.raises(InferenceServerException) as caught:
        stream.client.infer("doubled", [make_input(1)])
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    assert caught.value.message() == "ModelInfer RPC doesn't support models with decoupled transaction policy"
    with httpx.Client(base_url=f"http://{site.http}") as http:
        body = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}]}
        assert http.post("/v2/models/doubled/infer", json=body).status_code == 501
        assert "exactly 1 response" in http.post("/v2/models/doubled/generate", json={"IN": [2, 1]}).json()["error"]
        assert http.post("/v2/models/doubled/generate", json={"IN": [1, 1]}).json()["OUT"] == 0.0


def test_a_request_that_does_not_fit_is_refused_in_the_ensembles_name(stream: Stream) -> None:
    stream.ask("doubled", 1, id="7", outputs=["t"])
    assert stream.read() == "[request id: 7] unexpected inference output 't' for model 'doubled'"


def test_an_error_in_the_midst_is_one_message_and_the_others_come(stream: Stream) -> None:
    stream.ask("choosy", 4)
    assert stream.read_all() == [
        100,
        "in ensemble 'choosy', ValueError: not 1 (step 1, model 'picky')",
        102,
        103,
    ]
    stream.ask("doubled", 4, error_at=2)
    assert stream.read_all() == [0, 2, "in ensemble 'doubled', no 2 today (step 0, model 'count')", 6]
    stream.ask("doubled", 3, bare_at=1)
    assert stream.read_all() == [
        0,
        "in ensemble 'doubled', the answer has no output 'Y' (step 0, model 'count')",
        4,
    ]
    stream.ask("nested", 3, error_at=1)
    outer = "in ensemble 'nested', in ensemble 'doubled', no 1 today (step 0, model 'count') (step 0, model 'doubled')"
    assert stream.read_all() == [0, outer, 40, 41, 42, 43, 44]


def test_a_producer_that_fails_ends_the_stream_after_its_answers(stream: Stream) -> None:
    for model, before in (("doubled", [0, 2]), ("series", [0, 20, 22])):
        stream.ask(model, 4, id="7", fail_at=2)
        assert [stream.read() for _ in before] == before
        text = stream.read()
        assert text.startswith(f"in ensemble '{model}', ") and "it ends at 2" in text
        assert text.endswith("(step 0, model 'count')")
    stream.ask("doubled", 1)
    assert stream.read_all() == [0]


def test_a_client_that_leaves_stops_the_producer_and_the_steps(site: Site, stub: Any) -> None:
    gates.shut("held")
    call = stub.ModelStreamInfer(iter([write_request("narrow", MANY, WIDE, "leaves")]))
    gates.wait_entered("held")
    call.cancel()
    wait_until(lambda: "leaves" in told.cancelled)
    gates.open_gate("held")
    wait_until(lambda: is_quiet(site))
    assert told.sent["leaves"] < MANY
    assert find(site, "narrow").statistics().failures["CANCELED"] >= 1


def test_nothing_follows_the_last_answer(site: Site) -> None:
    """Not even the end of its time, which comes before the next answer is asked for."""
    tensor = Tensor("IN", "FP32", (1, 2), memoryview(np.array([2, 1], np.float32).tobytes()))
    request = InferenceRequest("doubled", "", [tensor], parameters={"final": True})

    async def ask() -> list[Any]:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + 1
        answers = []
        async with aclosing(site.application.dataplane.stream(request, deadline_ns=int(deadline_s * 1e9))) as stream:
            async for answer in stream:
                answers.append(answer.parameters.get(FINAL_RESPONSE, False))
                if answers[-1]:
                    over = asyncio.Event()
                    loop.call_at(deadline_s + 0.05, over.set)
                    await over.wait()
        return answers

    assert site.run(ask()) == [False, True]


async def test_an_aio_client_that_leaves_stops_the_producer(site: Site) -> None:
    async with triton_aio.InferenceServerClient(site.target) as client:

        async def ask() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "doubled", "inputs": [make_input(MANY, WIDE)], "request_id": "leaves_aio"}
            await asyncio.sleep(TIMEOUT_S)

        answers = client.stream_infer(ask())
        async for result, error in answers:
            assert error is None and result.as_numpy("OUT")[0, 0] == 0
            break
        answers.cancel()
        async with asyncio.timeout(TIMEOUT_S):
            while "leaves_aio" not in told.cancelled or not is_quiet(site):
                await asyncio.sleep(0.002)


def test_a_deadline_ends_the_stream(site: Site, stub: Any) -> None:
    gates.shut("held")
    call = stub.ModelStreamInfer(iter([write_request("narrow", 3, id="late")]), timeout=0.3)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gates.open_gate("held")
    wait_until(lambda: is_quiet(site))


def test_an_event_stream_that_is_left_stops_the_producer(site: Site) -> None:
    with (
        httpx.Client(base_url=f"http://{site.http}", timeout=TIMEOUT_S) as http,
        http.stream("POST", "/v2/models/doubled/generate_stream", json={"IN": [MANY, WIDE], "id": "events"}) as answer,
    ):
        assert next(answer.iter_lines()).startswith("data: ")
    wait_until(lambda: "events" in told.cancelled and is_quiet(site))


def test_who_never_reads_is_bounded_and_then_given_up(site: Site, stub: Any, stream: Stream) -> None:
    call = stub.ModelStreamInfer(iter([write_request("doubled", MANY, WIDE, "never")]))
    next(call)
    stream.ask("doubled", 3)  # of the same model with its only instance
    assert stream.read_all() == [0, 2, 4]
    assert told.sent["never"] < MANY // 2 and "never" in told.cancelled
    assert find(site, "doubled").statistics().stalled >= 1
    text = list(call)[-1].error_message
    assert f"no answer of this stream was taken for {STALL_S:g} s" in text
    wait_until(lambda: is_quiet(site))


def test_who_never_reads_gives_a_steps_only_place_back(site: Site, stub: Any, stream: Stream) -> None:
    call = stub.ModelStreamInfer(iter([write_request("one", 1_000, WIDE, "place")]))
    next(call)
    stream.ask("one", 2)
    assert stream.read_all() == [0, 1]
    call.cancel()
    wait_until(lambda: is_quiet(site))


# ---------------------------------------------------------------------------------------------------- in flight


def test_no_more_answers_are_in_flight_than_there_are_places(site: Site, stream: Stream) -> None:
    gates.shut("held")
    stream.ask("narrow", 50, id="bounded")
    gates.wait_entered("held")
    wait_until(lambda: find(site, "held").scheduler.in_flight == 3)
    wait_until(lambda: told.sent["bounded"] == 50)  # the producer is done: its answers wait
    time.sleep(0.05)  # were there more, they would come
    assert find(site, "held").scheduler.in_flight == 3
    gates.open_gate("held")
    assert stream.read_all() == list(range(50))


@pytest.mark.parametrize(("n", "width", "bound"), [(50, 1, 16), (12, 1_000_000, 4)])
def test_what_is_in_flight_is_bounded_where_nothing_is_said(
    site: Site, stream: Stream, n: int, width: int, bound: int
) -> None:
    gates.shut("held")
    stream.ask("usual", n, width)
    gates.wait_entered("held")
    wait_until(lambda: find(site, "held").scheduler.in_flight == bound)
    time.sleep(0.05)  # were there more, they would come
    assert find(site, "held").scheduler.in_flight == bound
    gates.open_gate("held")
    assert stream.read_all() == list(range(n))


def test_answers_keep_the_producers_order(stream: Stream) -> None:
    gates.shut("first")
    stream.ask("ordered", 30)
    gates.wait_entered("first")
    with pytest.raises(queue.Empty):
        stream.answers.get(timeout=0.1)  # the second is ready, but it is not its turn
    gates.open_gate("first")
    assert stream.read_all() == list(range(30))


def test_many_streams_at_once_share_places(site: Site) -> None:
    streams = [Stream(site) for _ in range(4)]
    try:
        for model in ("one_series", "one", "nested"):
            for each in streams:
                each.ask(model, 4)
            expected = {
                "one_series": [0, 20, 22, 40, 42, 44, 60, 62, 64, 66],
                "one": [0, 1, 2, 3],
                "nested": [0, 20, 21, 22, *(40 + j for j in range(5)), *(60 + j for j in range(7))],
            }[model]
            assert [each.read_all() for each in streams] == [expected] * 4
    finally:
        for each in streams:
            each.close()


# ------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("n", [0, 1, 5, 300])
def test_each_answer_runs_the_rest_once(site: Site, stream: Stream, n: int) -> None:
    before = find(site, "double").statistics().inference_count
    stream.ask("doubled", n, id="7")
    assert stream.read_all() == [2 * each for each in range(n)]
    assert find(site, "double").statistics().inference_count == before + n


def test_the_final_flag_comes_once_and_with_the_last_answer_where_the_model_says_so(stub: Any) -> None:
    for final in (True, False):
        request = write_request("doubled", 3, id="7")
        request.parameters["final"].bool_param = final
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        answers = [each.infer_response for each in stub.ModelStreamInfer(iter([request]))]
        flags = [each.parameters["triton_final_response"].bool_param for each in answers]
        assert flags == ([False, False, True] if final else [False, False, False, True])
        assert {(each.model_name, each.model_version, each.id) for each in answers} == {("doubled", "1", "7")}


def test_decoupled_steps_one_behind_the_other(stream: Stream) -> None:
    stream.ask("series", 3, 1)
    assert stream.read_all() == [0, 20, 22, 40, 42, 44]
    stream.ask("nested", 2)
    assert stream.read_all() == [0, 20, 21, 22]


def test_tensors_from_before_go_along_with_every_answer(stream: Stream) -> None:
    stream.ask("with_before", 3)
    assert stream.read_all() == [600, 601, 602]
    stream.ask("with_before", 2)
    assert stream.read_all("before") == [4, 4]
    stream.ask("shared", 2)  # who writes into its input spoils nothing for the answers that come after
    assert stream.read_all() == [200, 201]


def test_outputs_that_need_no_decoupled_step_come_once(site: Site, stream: Stream) -> None:
    before = find(site, "count").statistics().inference_count
    stream.client.stop_stream()
    stream.client.start_stream(lambda result, error: stream.answers.put(error or result))
    stream.client.async_stream_infer("with_before", [make_input(3)], outputs=[triton.InferRequestedOutput("before")])
    answer = stream.answers.get(timeout=TIMEOUT_S)
    assert answer.as_numpy("before")[0, 0] == 6
    assert answer.get_response().parameters["triton_final_response"].bool_param
    assert find(site, "count").statistics().inference_count == before


def test_events_over_rest(site: Site) -> None:
    with httpx.Client(base_url=f"http://{site.http}", timeout=TIMEOUT_S) as http:
        answer = http.post("/v2/models/choosy/generate_stream", json={"IN": [3, 1]})
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
    assert [event.get("OUT") for event in events] == [100, None, 102]
    assert "ValueError: not 1" in events[1]["error"]


async def test_the_aio_client_reads_all(site: Site) -> None:
    async with triton_aio.InferenceServerClient(site.target) as client:

        async def ask() -> AsyncIterator[dict[str, Any]]:
            for n in (3, 2):
                yield {"model_name": "series", "inputs": [make_input(n)], "request_id": str(n)}

        found: dict[str, list[float]] = {"3": [], "2": []}
        async for result, error in client.stream_infer(ask()):
            assert error is None
            found[result.get_response().id].append(float(result.as_numpy("OUT")[0, 0]))
    assert found == {"3": [0, 20, 22, 40, 42, 44], "2": [0, 20, 22]}


def test_configuration_and_statistics_tell_that_it_is_decoupled(site: Site, stream: Stream) -> None:
    config = stream.client.get_model_config("doubled", as_json=True)["config"]
    assert config["model_transaction_policy"]["decoupled"] is True
    stream.ask("doubled", 2)
    stream.read_all()
    statistics = stream.client.get_inference_statistics("doubled").model_stats[0]
    assert statistics.response_stats["1"].success.count > 0
    assert statistics.response_stats["1"].compute_infer.ns > 0
