"""Ensembles on a running server, asked by Triton's own client: what is refused and what fails first, then the rest."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ensemble_gates as gates
import numpy as np
import pytest
import tritonclient.grpc as triton
from ensembles import tensors, write_ensemble, write_model
from running_site import Site
from sequence_models import write_tally
from tritonclient.utils import InferenceServerException

from aiorch_server._core import read_copied_bytes

TIMEOUT_S = 20.0
GATES = "import ensemble_gates as gates"
CHAIN = (("double", {"X": "IN"}, {"Y": "between"}), ("add_one", {"X": "between"}, {"Y": "OUT"}))
HELD = (("held", {"X": "IN"}, {"Y": "between"}), ("add_one", {"X": "between"}, {"Y": "OUT"}))
QUEUE_OF_ONE = "dynamic_batching { default_queue_policy { max_queue_size: 1 allow_timeout_override: true } }"
ECHO = 'backend: "identity" max_batch_size: 8'


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("ensembles")
    write_model(root, "double")
    write_model(root, "add_one", "return {'Y': i['X'] + 1}")
    write_model(root, "refuse", "raise ValueError('no')")
    write_model(root, "held", "gates.hold('held')\nreturn {'Y': i['X'] * 2}", before=GATES)
    write_model(root, "narrow", "gates.hold('narrow')\nreturn {'Y': i['X']}", before=GATES, more=QUEUE_OF_ONE)
    write_model(root, "meet", "i['X'].any() and gates.meeting.wait(20)\nreturn {'Y': i['X'] + 1}", before=GATES)
    write_model(root, "meet_too", "i['X'].any() and gates.meeting.wait(20)\nreturn {'Y': i['X'] + 2}", before=GATES)
    write_model(root, "join", "return {'Y': i['P'] * 10 + i['Q']}", inputs=("P", "Q"))
    write_model(root, "split", "return {'Y': i['X'] + 1, 'Z': i['X'] + 2}", outputs=("Y", "Z"))
    write_model(root, "spoil", "i['X'][:] = 0\nreturn {'Y': i['X']}")
    write_model(root, "sum_all", "return {'Y': i['X'].sum(axis=0, keepdims=True)}", dims="[-1, -1]", size=0)
    write_model(root, "vector", "return {'Y': i['X'] * 3}", size=0)
    write_model(
        root,
        "upper",
        "return {'Y': np.char.upper(i['X'].astype('S')).astype(object)}",
        datatype="TYPE_STRING",
        before="import numpy as np",
    )
    for name in ("echo_one", "echo_two"):
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(f"{ECHO} {tensors('input', ['X'])} {tensors('output', ['Y'])}")
    write_ensemble(root, "chain", CHAIN)
    write_ensemble(root, "failing", (("double", {"X": "IN"}, {"Y": "b"}), ("refuse", {"X": "b"}, {"Y": "OUT"})))
    write_ensemble(root, "waiting", HELD)
    write_ensemble(root, "one_at_a_time", HELD, scheduling="max_inflight_requests: 1")
    write_ensemble(root, "crowded", (("narrow", {"X": "IN"}, {"Y": "OUT"}),))
    diamond = (
        ("join", {"P": "left", "Q": "right"}, {"Y": "OUT"}),
        ("meet", {"X": "start"}, {"Y": "left"}),
        ("meet_too", {"X": "start"}, {"Y": "right"}),
        ("double", {"X": "IN"}, {"Y": "start"}),
    )
    write_ensemble(root, "diamond", diamond)
    one_fails = (
        ("join", {"P": "left", "Q": "right"}, {"Y": "OUT"}),
        ("held", {"X": "IN"}, {"Y": "left"}),
        ("refuse", {"X": "IN"}, {"Y": "right"}),
    )
    write_ensemble(root, "one_fails", one_fails)
    both = (("split", {"X": "IN"}, {"Y": "A", "Z": "z"}), ("double", {"X": "z"}, {"Y": "B"}))
    write_ensemble(root, "pruned", both, outputs=("A", "B"))
    write_ensemble(root, "optional", (("join", {"P": "IN", "Q": "MORE"}, {"Y": "OUT"}),), inputs=("IN", "MORE"))
    config = root / "optional" / "config.pbtxt"
    config.write_text(config.read_text().replace('name: "MORE"', 'name: "MORE" optional: true'))
    shared = (
        ("double", {"X": "IN"}, {"Y": "t"}),
        ("spoil", {"X": "t"}, {"Y": "A"}),
        ("add_one", {"X": "t"}, {"Y": "B"}),
    )
    write_ensemble(root, "shared", shared, outputs=("A", "B", "t"))
    inner = (("spoil", {"X": "IN"}, {"Y": "A"}), ("add_one", {"X": "IN"}, {"Y": "B"}))
    write_ensemble(root, "inner", inner, outputs=("A", "B"))
    outer = (("double", {"X": "IN"}, {"Y": "t"}), ("inner", {"IN": "t"}, {"A": "A", "B": "B"}))
    write_ensemble(root, "shared_inside", outer, outputs=("A", "B"))
    write_ensemble(root, "whole", (("sum_all", {"X": "IN"}, {"Y": "OUT"}),))
    write_ensemble(root, "vectors", (("vector", {"X": "IN"}, {"Y": "t"}), ("add_one", {"X": "t"}, {"Y": "OUT"})))
    write_ensemble(root, "nested", (("chain", {"IN": "IN"}, {"OUT": "t"}), ("chain", {"IN": "t"}, {"OUT": "OUT"}, 1)))
    write_ensemble(root, "nested_failing", (("failing", {"IN": "IN"}, {"OUT": "OUT"}),))
    write_ensemble(root, "texts", (("upper", {"X": "IN"}, {"Y": "OUT"}),), datatype="TYPE_STRING")
    write_ensemble(root, "echoes", (("echo_one", {"X": "IN"}, {"Y": "t"}), ("echo_two", {"X": "t"}, {"Y": "OUT"})))
    write_tally(root, "tally")
    tally = (("tally", {"value": "IN"}, {"total": "OUT"}),)
    write_ensemble(root, "sequences", tally, datatype="TYPE_INT64", dims="[1]", size=4)
    site = Site(root, io_threads=1)
    yield site
    site.close()


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[Any]:
    client = triton.InferenceServerClient(site.target)
    yield client
    client.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def ask(
    client: Any, model: str, *, outputs: Any = None, id: str = "", timeout_s: float = TIMEOUT_S, **inputs: Any
) -> Any:
    more = {name: inputs.pop(name) for name in ("priority", "timeout", "parameters") if name in inputs}
    given = []
    for name, array in inputs.items():
        tensor = triton.InferInput(name, array.shape, {"f": "FP32", "O": "BYTES"}[array.dtype.kind])
        tensor.set_data_from_numpy(array)
        given.append(tensor)
    wanted = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
    return client.infer(model, given, outputs=wanted, request_id=id, client_timeout=timeout_s, **more)


def stats(client: Any, model: str) -> Any:
    return client.get_inference_statistics(model).model_stats[0]


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.002)


def row(*values: float) -> np.ndarray[Any, Any]:
    return np.array([values], np.float32)


def test_a_failing_step_is_named_with_its_ensemble(client: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask(client, "failing", IN=row(1))
    assert caught.value.status() == "StatusCode.INTERNAL"
    assert caught.value.message() == "in ensemble 'failing', ValueError: no (step 1, model 'refuse')"
    with pytest.raises(InferenceServerException) as caught:
        ask(client, "nested_failing", IN=row(1))
    assert caught.value.message() == (
        "in ensemble 'nested_failing', in ensemble 'failing', ValueError: no (step 1, model 'refuse') "
        "(step 0, model 'failing')"
    )


def test_a_request_that_does_not_fit_the_ensemble_is_refused_in_its_name(client: Any) -> None:
    with pytest.raises(InferenceServerException, match=r"\[request id: 7\] unexpected inference input 'X' .* 'chain'"):
        ask(client, "chain", id="7", IN=row(1), X=row(1))
    with pytest.raises(InferenceServerException, match="batch-size must be <= 8 for 'chain'"):
        ask(client, "chain", IN=np.zeros((9, 1), np.float32))
    with pytest.raises(InferenceServerException, match="unexpected inference output 'between' for model 'chain'"):
        ask(client, "chain", outputs=["between"], IN=row(1))


def test_shapes_that_only_a_request_shows_not_to_fit_are_told_by_the_step(client: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask(client, "vectors", id="7", IN=np.zeros((2, 3), np.float32))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert caught.value.message() == (
        "in ensemble 'vectors', [request id: 7] unexpected shape for input 'X' for model 'vector'. Expected [-1], got "
        "[2,3]. (step 0, model 'vector')"
    )


def test_an_optional_input_that_a_step_cannot_do_without_is_missed_by_the_step(client: Any) -> None:
    np.testing.assert_array_equal(ask(client, "optional", IN=row(1), MORE=row(2)).as_numpy("OUT"), row(12))
    with pytest.raises(InferenceServerException, match=r"in ensemble 'optional'.* missing required input\(s\) \['Q'\]"):
        ask(client, "optional", IN=row(1))


def test_a_full_queue_of_a_step_refuses_with_its_name_and_the_requests_id(
    client: Any, site: Site, pool: ThreadPoolExecutor
) -> None:
    gates.shut("narrow")
    first = pool.submit(ask, client, "crowded", IN=row(1))
    gates.wait_entered("narrow")
    second = pool.submit(ask, client, "crowded", IN=row(2))
    wait_until(lambda: site.count_pending("narrow") == 1)
    with pytest.raises(InferenceServerException) as caught:
        ask(client, "crowded", id="7", IN=row(3))
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
    assert caught.value.message() == (
        "in ensemble 'crowded', [request id: 7] Exceeds maximum queue size (step 0, model 'narrow')"
    )
    gates.open_gate("narrow")
    for value, future in ((1, first), (2, second)):
        np.testing.assert_array_equal(future.result(TIMEOUT_S).as_numpy("OUT"), row(value))


def test_the_parameter_timeout_holds_in_the_queue_of_a_step(client: Any, pool: ThreadPoolExecutor) -> None:
    gates.shut("narrow")
    first = pool.submit(ask, client, "crowded", IN=row(1))
    gates.wait_entered("narrow")
    late = pool.submit(ask, client, "crowded", timeout=1000, IN=row(2))
    with pytest.raises(InferenceServerException, match=r"Request timeout expired \(step 0, model 'narrow'\)"):
        late.result(TIMEOUT_S)  # while the instance is busy
    gates.open_gate("narrow")
    first.result(TIMEOUT_S)


def test_the_callers_deadline_holds_for_all_steps_together(client: Any, pool: ThreadPoolExecutor) -> None:
    gates.shut("held")
    before = stats(client, "add_one").inference_count
    with pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
        ask(client, "waiting", timeout_s=0.2, IN=row(1))
    gates.open_gate("held")
    wait_until(lambda: stats(client, "waiting").inference_stats.fail.count > 0)
    ask(client, "waiting", IN=row(1))
    assert stats(client, "add_one").inference_count == before + 1


def test_a_cancelled_request_begins_no_further_step(client: Any, site: Site) -> None:
    gates.shut("held")
    before = stats(client, "add_one").inference_count
    (ensemble,) = (each for each in site.application.manager.servables() if each.name == "waiting")
    tensor = triton.InferInput("IN", [1, 1], "FP32")
    tensor.set_data_from_numpy(row(1))
    answered: Future[Any] = Future()
    call = client.async_infer("waiting", [tensor], lambda result, error: answered.set_result(error))
    gates.wait_entered("held")
    call.cancel()
    assert "CANCELLED" in str(answered.result(TIMEOUT_S))
    wait_until(lambda: ensemble.pending == 0)
    gates.open_gate("held")
    ask(client, "waiting", IN=row(1))
    assert stats(client, "add_one").inference_count == before + 1
    assert ensemble.statistics().failures["CANCELED"] >= 1


def test_when_a_step_fails_its_siblings_are_given_up(client: Any, site: Site) -> None:
    gates.shut("held")
    with pytest.raises(InferenceServerException, match="in ensemble 'one_fails', ValueError: no"):
        ask(client, "one_fails", IN=row(1))
    gates.open_gate("held")
    wait_until(lambda: all(each.pending == 0 for each in site.application.manager.servables()))


@pytest.mark.parametrize("width", [3, 100_000])
def test_a_chain_of_two_answers_as_the_models_in_a_row(client: Any, width: int) -> None:
    given = np.arange(width, dtype=np.float32)[None]
    answer = ask(client, "chain", id="7", IN=given)
    np.testing.assert_array_equal(answer.as_numpy("OUT"), given * 2 + 1)
    response = answer.get_response()
    assert (response.model_name, response.model_version, response.id) == ("chain", "1", "7")


def test_steps_that_do_not_wait_for_each_other_run_at_the_same_time(client: Any) -> None:
    np.testing.assert_array_equal(ask(client, "diamond", IN=row(1)).as_numpy("OUT"), row(34))


def test_requests_form_batches_in_each_step_of_their_own(client: Any, site: Site, pool: ThreadPoolExecutor) -> None:
    gates.shut("held")
    before = stats(client, "held").execution_count
    futures = [pool.submit(ask, client, "waiting", IN=row(0))]
    gates.wait_entered("held")
    futures += [pool.submit(ask, client, "waiting", IN=row(value)) for value in range(1, 6)]
    wait_until(lambda: site.count_pending("held") == 5)
    gates.open_gate("held")
    for value, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(TIMEOUT_S).as_numpy("OUT"), row(value * 2 + 1))
    assert stats(client, "held").execution_count == before + 2


def test_no_more_requests_are_in_a_step_than_it_has_places(client: Any, site: Site, pool: ThreadPoolExecutor) -> None:
    gates.shut("held")
    futures = [pool.submit(ask, client, "one_at_a_time", IN=row(value)) for value in range(3)]
    gates.wait_entered("held")
    (ensemble,) = (each for each in site.application.manager.servables() if each.name == "one_at_a_time")
    wait_until(lambda: ensemble.scheduler.in_flight == 3)
    assert site.count_pending("held") == 0
    gates.open_gate("held")
    for value, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(TIMEOUT_S).as_numpy("OUT"), row(value * 2 + 1))
    assert stats(client, "one_at_a_time").inference_stats.queue.ns > 0


def test_only_the_steps_that_lead_to_the_wanted_outputs_run(client: Any) -> None:
    before = stats(client, "double").inference_count
    answer = ask(client, "pruned", outputs=["A"], IN=row(1))
    np.testing.assert_array_equal(answer.as_numpy("A"), row(2))
    assert [output.name for output in answer.get_response().outputs] == ["A"]
    assert stats(client, "double").inference_count == before
    answer = ask(client, "pruned", IN=row(1))
    np.testing.assert_array_equal(answer.as_numpy("B"), row(6))
    assert stats(client, "double").inference_count == before + 1


@pytest.mark.parametrize("width", [2, 100_000])
def test_a_model_that_writes_into_its_input_spoils_no_other_readers_tensor(client: Any, width: int) -> None:
    answer = ask(client, "shared", IN=np.ones((1, width), np.float32))
    assert {name: set(answer.as_numpy(name)[0].tolist()) for name in "ABt"} == {"A": {0.0}, "B": {3.0}, "t": {2.0}}
    answer = ask(client, "shared_inside", IN=np.ones((1, width), np.float32))
    assert {name: set(answer.as_numpy(name)[0].tolist()) for name in "AB"} == {"A": {0.0}, "B": {3.0}}


def test_a_model_without_batches_takes_the_whole_tensor_or_a_single_row(client: Any) -> None:
    given = np.array([[1, 2], [3, 4]], np.float32)
    np.testing.assert_array_equal(ask(client, "whole", IN=given).as_numpy("OUT"), row(4, 6))
    np.testing.assert_array_equal(ask(client, "vectors", IN=row(1, 2)).as_numpy("OUT"), row(4, 7))


def test_an_ensemble_may_be_a_step(client: Any) -> None:
    np.testing.assert_array_equal(ask(client, "nested", IN=row(1)).as_numpy("OUT"), row(7))


def test_a_sequence_model_as_a_step_gets_the_requests_place_in_its_sequence(client: Any) -> None:
    def send(sequence: int, value: int, **place: bool) -> int:
        tensor = triton.InferInput("IN", [1, 1], "INT64")
        tensor.set_data_from_numpy(np.array([[value]], np.int64))
        answer = client.infer("sequences", [tensor], sequence_id=sequence, client_timeout=TIMEOUT_S, **place)
        return int(answer.as_numpy("OUT")[0, 0])

    with pytest.raises(
        InferenceServerException, match=r"^\[.*\] in ensemble 'sequences', .*must specify the START flag"
    ):
        send(5, 1)
    assert [send(6, 1, sequence_start=True), send(7, 10, sequence_start=True)] == [1, 10]
    assert [send(6, 2), send(7, 20), send(6, 3, sequence_end=True), send(7, 30, sequence_end=True)] == [3, 30, 6, 60]


@pytest.mark.parametrize("size", [1, 30_000])
def test_texts_pass_from_step_to_step(client: Any, size: int) -> None:
    given = np.array([[b"a" * size, b"", b"b"]], np.object_)
    assert ask(client, "texts", IN=given).as_numpy("OUT").tolist() == [[b"A" * size, b"", b"B"]]


@pytest.mark.parametrize(("ensemble", "steps"), [("echoes", 2), ("nested", 4)])
def test_nothing_is_copied_between_steps(client: Any, ensemble: str, steps: int) -> None:
    given = np.ones((1, 150_000), np.float32)
    ask(client, ensemble, IN=given)  # memory is taken once
    before = read_copied_bytes()
    ask(client, ensemble, IN=given)
    copied = {place: after - before[place] for place, after in read_copied_bytes().items()}
    # Each step's answer is written once. What the client sent may lie askew, and a python model could write into it.
    assert copied["encoded"] == steps * given.nbytes
    assert copied["gathered"] <= given.nbytes


def test_an_ensemble_has_statistics_configuration_and_metadata(client: Any, site: Site) -> None:
    before = stats(client, "chain")
    ask(client, "chain", IN=np.zeros((3, 2), np.float32))
    after = stats(client, "chain")
    assert after.inference_count == before.inference_count + 3
    assert after.execution_count == before.execution_count + 1
    assert 3 in [each.batch_size for each in after.batch_stats]
    times = after.inference_stats
    counts = {each.count for each in (times.success, times.queue, times.compute_input, times.compute_infer)}
    assert counts == {after.execution_count} and times.success.ns > 0
    config = client.get_model_config("chain").config
    assert config.platform == "ensemble" and not config.instance_group and not config.backend
    assert [each.model_name for each in config.ensemble_scheduling.step] == ["double", "add_one"]
    metadata = client.get_model_metadata("chain")
    assert (metadata.platform, list(metadata.inputs[0].shape)) == ("ensemble", [-1, -1])
    with urllib.request.urlopen(f"http://{site.http}/v2/models/chain/stats", timeout=TIMEOUT_S) as answer:
        assert json.load(answer)["model_stats"][0]["inference_count"] == after.inference_count


def test_rest_serves_ensembles_too(site: Site) -> None:
    body = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    request = urllib.request.Request(f"http://{site.http}/v2/models/chain/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        assert json.load(answer)["outputs"][0]["data"] == [3.0, 5.0]


def test_many_requests_get_each_their_own_answer(site: Site) -> None:
    async def all_at_once() -> None:
        import tritonclient.grpc.aio as triton_aio

        async with triton_aio.InferenceServerClient(site.target) as client:

            async def one(value: int) -> None:
                tensor = triton.InferInput("IN", [1, 1], "FP32")
                tensor.set_data_from_numpy(row(value))
                model = ("chain", "nested", "pruned")[value % 3]
                answer = await client.infer(model, [tensor], client_timeout=TIMEOUT_S)
                name, expected = (("OUT", value * 2 + 1), ("OUT", value * 4 + 3), ("B", value * 2 + 4))[value % 3]
                np.testing.assert_array_equal(answer.as_numpy(name), row(expected))

            await asyncio.gather(*map(one, range(300)))

    asyncio.run(all_at_once())
