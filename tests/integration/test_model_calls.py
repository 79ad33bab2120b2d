"""Models that call models, on a running server: rings, failures and callers that go away first, then the rest."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import ensemble_gates as gates
import numpy as np
import pytest
import tritonclient.grpc as triton
from ensembles import write_ensemble, write_model
from running_site import Site
from tritonclient.utils import InferenceServerException

from aiorch_server.execution.model_calls import PendingCall, _Exchange

TIMEOUT_S = 20.0
CALLS = """
import asyncio
import threading
import ensemble_gates as gates
import numpy as np
from aiorch_backends.python.calling import call, call_async
from aiorch_server.errors import AiorchError
from aiorch_server.types import InferenceRequest, Tensor

class Base:
    def load(self, context):
        self.context = context

    def ask(self, model, array, **more):
        return call(self.context, model, {"X": array}, **more)["Y"]

    def pass_on(self, model, data, shape):
        request = InferenceRequest(model, "", [Tensor("X", "FP32", tuple(shape), data)])
        return next(iter(self.context.call_model(request))).outputs
"""
GATES = "import ensemble_gates as gates"
#: Triton's way: calls the model that stands in its parameter ``to``, all requests at once where it is ``together``.
TRITON = """
import asyncio
import json
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        self.to = parameters["to"]["string_value"]
        self.is_together = "together" in parameters

    def make(self, request):
        given = pb_utils.get_input_tensor_by_name(request, "X")
        return pb_utils.InferenceRequest(model_name=self.to, requested_output_names=["Y"], inputs=[given])

    def answer(self, found):
        if found.has_error():
            return pb_utils.InferenceResponse(error=found.error())
        return pb_utils.InferenceResponse([pb_utils.get_output_tensor_by_name(found, "Y")])

    def execute(self, requests):
        if self.is_together:
            return asyncio.run(self.ask_together(requests))
        return [self.answer(self.make(request).exec()) for request in requests]

    async def ask_together(self, requests):
        return [self.answer(each) for each in await asyncio.gather(*(self.make(r).async_exec() for r in requests))]
"""


def write_triton(root: Path, name: str, to: str, more: str = "") -> None:
    write_model(root, name, more=f'parameters {{ key: "to" value {{ string_value: "{to}" }} }} {more}')
    (root / name / "1" / "model.py").write_text(TRITON)


def write_caller(root: Any, name: str, code: str, **more: Any) -> None:
    """A model with ``self.ask(model, array)``; a warm-up with zeros calls nobody."""
    code = "if not i['X'].any(): return {'Y': i['X']}\n" + code
    write_model(root, name, code, before=CALLS, **more)
    path = root / name / "1" / "model.py"
    path.write_text(path.read_text().replace("class Model:", "class Model(Base):"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("calls")
    write_model(root, "double")
    write_model(root, "refuse", "if i['X'].any(): raise ValueError('no')\nreturn {'Y': i['X']}")
    write_model(root, "held", "gates.hold('callee')\nreturn {'Y': i['X'] * 2}", before=GATES)
    write_caller(root, "caller", "return {'Y': self.ask('double', i['X']) + 1}")
    write_caller(root, "to_refuse", "return {'Y': self.ask('refuse', i['X'])}")
    write_caller(root, "to_nobody", "return {'Y': self.ask('nobody', i['X'])}")
    write_caller(root, "to_wrong", "return {'Y': self.ask('double', i['X'].astype('i4'))}")
    write_caller(root, "to_held", "return {'Y': self.ask('held', i['X'])}", more="dynamic_batching {}")
    write_caller(root, "hurried", "return {'Y': self.ask('held', i['X'], timeout_s=0.05)}")
    write_caller(root, "itself", "return {'Y': self.ask('itself', i['X'] - 1)}")
    write_caller(
        root, "itself_twice", "return {'Y': self.ask('itself_twice', i['X'] - 1)}", more="instance_group { count: 2 }"
    )
    write_caller(root, "ping", "return {'Y': self.ask('pong', i['X'])}")
    write_caller(root, "pong", "return {'Y': self.ask('ring', i['X'])}")
    write_caller(root, "tick", "return {'Y': self.ask('tock', i['X'])}")
    write_caller(root, "tock", "return {'Y': self.ask('tick', i['X'])}")
    write_ensemble(root, "ring", (("ping", {"X": "X"}, {"Y": "Y"}),), inputs=("X",), outputs=("Y",))
    for depth in range(20):
        write_caller(root, f"deep_{depth}", f"return {{'Y': self.ask('deep_{depth + 1}', i['X'])}}")
    write_model(root, "deep_20")
    write_caller(
        root,
        "gathered",
        "async def both():\n"
        "    return await asyncio.gather(*(call_async(self.context, m, {'X': i['X']}) for m in ('double', 'caller')))\n"
        "one, two = asyncio.run(both())\n"
        "return {'Y': one['Y'] * 100 + two['Y']}",
    )
    write_caller(
        root,
        "threaded",
        "found = []\n"
        "thread = threading.Thread(target=lambda: found.append(self.ask('double', i['X'])))\n"
        "thread.start()\nthread.join()\n"
        "return {'Y': found[0]}",
    )
    write_ensemble(
        root,
        "whole",
        (("caller", {"X": "X"}, {"Y": "t"}), ("double", {"X": "t"}, {"Y": "Y"})),
        inputs=("X",),
        outputs=("Y",),
    )
    write_model(root, "scribbler", "i['X'][:] = -1\nreturn {'Y': i['X']}")
    write_caller(
        root,
        "keeper",
        "(kept,) = self.pass_on('double', i['X'].view(np.uint8).data, i['X'].shape)\n"
        "self.pass_on('scribbler', kept.data, kept.shape)\n"
        "return {'Y': np.frombuffer(kept.data, np.float32).reshape(kept.shape)}",
    )
    write_caller(root, "to_ensemble", "return {'Y': self.ask('whole', i['X'])}")
    write_triton(root, "triton", "caller")
    write_triton(root, "triton_together", "double", 'parameters { key: "together" value { string_value: "1" } }')
    write_triton(root, "triton_to_refuse", "refuse")
    write_triton(root, "triton_itself", "triton_itself")
    site = Site(root, io_threads=1)
    yield site
    site.close()


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[Any]:
    client = triton.InferenceServerClient(site.target)
    yield client
    client.close()


def make_input(*values: float) -> Any:
    array = np.array([values], np.float32)
    tensor = triton.InferInput("X", array.shape, "FP32")
    tensor.set_data_from_numpy(array)
    return tensor


def ask(client: Any, model: str, *values: float, id: str = "", timeout_s: float = TIMEOUT_S) -> list[float]:
    answer = client.infer(model, [make_input(*values)], request_id=id, client_timeout=timeout_s)
    return [float(value) for value in answer.as_numpy("Y")[0]]


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.002)


def read_failures(site: Site, model: str) -> dict[str, int]:
    (servable,) = (each for each in site.application.manager.servables() if each.name == model)
    return dict(servable.statistics().failures)


@pytest.mark.parametrize(
    ("model", "status", "text"),
    [
        ("to_refuse", "INTERNAL", "ValueError: no"),
        ("to_nobody", "INVALID_ARGUMENT", "Request for unknown model: 'nobody' is not found"),
        ("to_wrong", "INVALID_ARGUMENT", "inference input 'X' data-type is 'INT32', but model 'double' expects 'FP32'"),
        (
            "itself",
            "INVALID_ARGUMENT",
            "model 'itself' cannot be called by a call of its own, itself -> itself: its only instance",
        ),
        (
            "itself_twice",
            "INVALID_ARGUMENT",
            "-> itself_twice -> itself_twice: all of its 2 instances wait",
        ),
        ("ping", "INVALID_ARGUMENT", "model 'ping' cannot be called by a call of its own, ping -> pong -> ping"),
        ("triton_to_refuse", "INTERNAL", "ValueError: no"),
        ("triton_itself", "INVALID_ARGUMENT", "model 'triton_itself' cannot be called by a call of its own"),
        ("deep_0", "INVALID_ARGUMENT", "calls between models are more than 16 deep: deep_0 -> deep_1"),
    ],
)
def test_what_goes_wrong_in_a_call_is_told_to_the_caller(client: Any, model: str, status: str, text: str) -> None:
    with pytest.raises(InferenceServerException) as caught:
        ask(client, model, 5)
    assert caught.value.status() == f"StatusCode.{status}"
    assert text in caught.value.message()


def test_calls_as_deep_as_they_may_be_work(client: Any) -> None:
    assert ask(client, "deep_5", 3) == [6]


def test_a_call_ends_at_its_own_timeout(client: Any) -> None:
    gates.shut("callee")
    try:
        with pytest.raises(InferenceServerException, match="Deadline Exceeded") as caught:
            ask(client, "hurried", 1)
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    finally:
        gates.open_gate("callee")


def test_a_call_is_cancelled_with_its_caller(client: Any, site: Site) -> None:
    assert ask(client, "to_held", 1) == [2]  # and so what others asked of the only instance is over and counted
    gates.shut("callee")
    before = {name: read_failures(site, name)["CANCELED"] for name in ("held", "to_held")}
    answered: Future[Any] = Future()
    call = client.async_infer("to_held", [make_input(1)], lambda result, error: answered.set_result(error))
    gates.wait_entered("callee")
    call.cancel()
    assert "CANCELLED" in str(answered.result(TIMEOUT_S))
    # the caller's instance is free again although the called model still runs
    wait_until(lambda: read_failures(site, "to_held")["CANCELED"] > before["to_held"])
    assert client.is_server_live()  # by the loop, which was told of the cancellation before
    gates.open_gate("callee")
    assert ask(client, "to_held", 1) == [2]
    assert read_failures(site, "held")["CANCELED"] == before["held"] + 1


def test_two_chains_that_wait_for_each_other_do_not_wait_for_ever(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiorch_server.execution.model_calls.REENTRANT_TIMEOUT_S", 0.2)
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(ask, client, "itself_twice", 9) for _ in range(4)]
        errors = [future.exception(2 * TIMEOUT_S) for future in futures]
    assert all(isinstance(error, InferenceServerException) for error in errors)
    assert time.monotonic() - began < TIMEOUT_S, "only the clients' patience ended them"


def test_models_that_call_each_other_do_not_wait_for_ever(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds its only instance and waits for the other's, in two chains of which none contains a model twice."""
    monkeypatch.setattr("aiorch_server.execution.model_calls.CALL_TIMEOUT_S", 0.5)
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask, client, name, 9) for name in ("tick", "tock") * 4]
        errors = [future.exception(2 * TIMEOUT_S) for future in futures]
    assert all(isinstance(error, InferenceServerException) for error in errors)
    assert time.monotonic() - began < TIMEOUT_S, "only the clients' patience ended them"


def test_a_model_calls_another_and_both_count(client: Any) -> None:
    before = client.get_inference_statistics("double").model_stats[0].inference_count
    assert ask(client, "caller", 4) == [9]
    assert client.get_inference_statistics("double").model_stats[0].inference_count == before + 1


def test_coroutines_and_threads_of_a_model_call_too(client: Any) -> None:
    assert ask(client, "gathered", 1) == [203]
    assert ask(client, "threaded", 3) == [6]


def test_tritons_models_call_with_exec_and_async_exec(client: Any) -> None:
    assert ask(client, "triton", 4) == [9]
    assert ask(client, "triton_together", 4) == [8]


def test_an_ensemble_may_call_and_be_called(client: Any) -> None:
    assert ask(client, "whole", 1) == [6]
    assert ask(client, "to_ensemble", 1) == [6]


def test_big_tensors_cross_uncopied_and_right(client: Any) -> None:
    values = np.arange(50_000, dtype=np.float32)
    assert ask(client, "caller", *values) == [value * 2 + 1 for value in values.tolist()]


def test_what_a_called_model_writes_into_its_input_is_not_seen_by_the_caller(client: Any) -> None:
    values = np.arange(1, 50_001, dtype=np.float32)
    assert ask(client, "keeper", *values) == (values * 2).tolist()


def test_calls_of_many_callers_form_batches(client: Any, site: Site) -> None:
    gates.shut("callee")
    (held,) = (each for each in site.application.manager.servables() if each.name == "held")
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, client, "held", 1)
        gates.wait_entered("callee")
        others = [pool.submit(ask, client, "held", value) for value in (2, 3)]
        others.append(pool.submit(ask, client, "to_held", 4))
        wait_until(lambda: held.scheduler.pending == 3)
        executions = held.statistics().execution_count
        gates.open_gate("callee")
        assert [future.result(TIMEOUT_S) for future in (first, *others)] == [[2], [4], [6], [8]]
    assert held.statistics().execution_count == executions + 2


def test_a_cached_ensemble_that_its_own_step_calls_is_refused_at_once(tmp_path: Path) -> None:
    code = "return {'Y': call(self.context, 'ring', {'IN': i['X']})['OUT']}"
    write_caller(tmp_path, "calls_ring", code)
    wiring = (("calls_ring", {"X": "IN"}, {"Y": "OUT"}),)
    write_ensemble(tmp_path, "ring", wiring, more="response_cache { enable: true }")
    site = Site(tmp_path, io_threads=1, cache={"kind": "local"})
    try:
        with triton.InferenceServerClient(site.target) as client:
            tensor = triton.InferInput("IN", [1, 1], "FP32")
            tensor.set_data_from_numpy(np.array([[1]], np.float32))
            asked = [triton.InferRequestedOutput("OUT")]
            with pytest.raises(InferenceServerException, match="its only instance waits for that call"):
                client.infer("ring", [tensor], outputs=asked, client_timeout=TIMEOUT_S)
            with pytest.raises(InferenceServerException, match="its only instance waits for that call"):
                client.infer("ring", [tensor], client_timeout=TIMEOUT_S)
    finally:
        site.close()


def test_a_dropped_call_may_be_collected_while_its_answer_is_put() -> None:
    """The collector runs on any thread at any time: also on the event loop, in the middle of the call's own lock."""
    exchange = _Exchange(asyncio.new_event_loop())
    dropped: list[object] = [PendingCall(exchange, lambda: False)]
    dropped.append(dropped)

    class Answers(deque[Any]):
        def append(self, answer: Any) -> None:
            dropped_here.clear()
            gc.collect()
            super().append(answer)

    dropped_here, exchange._answers = [dropped], Answers()
    del dropped
    putting = threading.Thread(target=lambda: asyncio.run(exchange.put(cast(Any, None))), daemon=True)
    putting.start()
    putting.join(10)
    exchange.loop.close()
    assert not putting.is_alive()
    assert exchange._is_cancelled
