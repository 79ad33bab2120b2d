"""A server that is told an objective: what it learns, refuses and explains, and that every request is answered once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import InferenceStub

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig
from aiorch_server.errors import AiorchError, RegistryUnavailable
from aiorch_server.execution.placement import count_cpus
from aiorch_server.optimizer import optimizer, tuned
from aiorch_server.optimizer.tuner import State

RUN_S, MAX_ROWS, TARGET_S = 0.04, 4, 0.3
CAPACITY = MAX_ROWS / RUN_S
MODEL = """
backend: "identity"
max_batch_size: 4
input [ { name: "X" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ 1 ] } ]
parameters { key: "execute_delay_us" value { string_value: "40000" } }
"""

#: A model whose batches save nothing.
BY_THE_ROW = """
import time

class Model:
    inputs = [("X", "FP32", [1])]
    outputs = [("Y", "FP32", [1])]
    max_batch_size = 4

    def execute(self, inputs):
        time.sleep(0.01 * len(inputs["X"]))
        return {"Y": inputs["X"]}
"""


@asynccontextmanager
async def serving(
    root: Path, *, model: str = MODEL, **parameters: str
) -> AsyncIterator[tuple[Application, InferenceStub]]:
    (root / "m" / "1").mkdir(parents=True, exist_ok=True)
    told = [f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}' for key, text in parameters.items()]
    (root / "m" / "config.pbtxt").write_text(model + "\n".join(told))
    config = ServerConfig.model_validate(
        {
            "repository": {"paths": [str(root)]},
            "grpc": {"port": 0},
            "http": {"enabled": False},
            "metrics": {"enabled": False},
        }
    )
    async with Application(config) as app, grpc.aio.insecure_channel(f"127.0.0.1:{app.grpc_port}") as channel:
        yield app, InferenceStub(channel)


async def call(stub: InferenceStub, number: int) -> tuple[str, float, str]:
    """Status, seconds, and the refusal's text; the answer must be this request's own."""
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[np.float32(number).tobytes()])
    request.inputs.add(name="X", datatype="FP32", shape=[1, 1])
    began = time.monotonic()
    try:
        answer = await stub.ModelInfer(request)
    except grpc.aio.AioRpcError as error:
        return error.code().name, time.monotonic() - began, str(error.details())
    assert np.frombuffer(answer.raw_output_contents[0], np.float32)[0] == number
    return "OK", time.monotonic() - began, ""


async def offer(stub: InferenceStub, rate: float, seconds: float) -> list[tuple[str, float, str]]:
    """An open loop: requests at random times, whatever becomes of those before."""
    random = np.random.default_rng(1)
    began, due_s, calls = time.monotonic(), 0.0, []
    while due_s < seconds:
        due_s += random.exponential(1 / rate)
        await asyncio.sleep(max(0.0, began + due_s - time.monotonic()))
        calls.append(asyncio.create_task(call(stub, len(calls))))
    return list(await asyncio.wait_for(asyncio.gather(*calls), 60))


@pytest.mark.alone
async def test_twice_what_can_be_served(tmp_path: Path) -> None:
    async with serving(tmp_path, objective=f"p99={round(1000 * TARGET_S)}ms, instances=1") as (app, stub):
        await offer(stub, CAPACITY / 2, 3.0)
        found = await offer(stub, 2 * CAPACITY, 5.0)
        assert app.optimizer is not None
        (account,) = app.optimizer.explain("m")
    codes = Counter(code for code, _, _ in found)
    assert set(codes) == {"OK", "UNAVAILABLE"}
    good = sum(code == "OK" and taken_s <= TARGET_S for code, taken_s, _ in found)
    assert good / 5.0 >= 0.75 * CAPACITY
    assert codes["OK"] - good <= 0.1 * codes["OK"]
    refusals = [(taken_s, text) for code, taken_s, text in found if code == "UNAVAILABLE"]
    assert all("objective" in text for _, text in refusals)
    assert np.median([taken_s for taken_s, _ in refusals]) < TARGET_S
    assert (account.knobs["instances"], account.objective.latency_us) == (1, 300_000)


async def test_without_an_objective_nothing_is_refused_and_instances_stay(tmp_path: Path) -> None:
    async with serving(tmp_path) as (app, stub):
        (servable,) = app.manager.servables()
        assert servable.plain_scheduler is not None
        written = servable.plain_scheduler.policy()
        found = await offer(stub, 2 * CAPACITY, 1.5)
        assert app.optimizer is not None
        (account,) = app.optimizer.explain("m")
        assert servable.plain_scheduler.policy() == written
    assert {code for code, _, _ in found} == {"OK"}
    assert (account.objective.latency_us, account.knobs["max_batch_size"], account.decisions) == (0, MAX_ROWS, ())


async def test_without_an_objective_the_cap_goes_to_the_knee(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "_PLAIN_LOOK_S", 0.5)
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.py").write_text(BY_THE_ROW)
    async with serving(tmp_path, model='backend: "python" max_batch_size: 4') as (app, stub):
        assert app.optimizer is not None
        async with asyncio.timeout(40):
            while not (accounts := app.optimizer.explain("m")) or not accounts[0].decisions:
                found = await offer(stub, 120, 1.0)
                assert {code for code, _, _ in found} == {"OK"}
    (decision,) = accounts[0].decisions
    assert (decision.knob, decision.before) == ("max_batch_size", MAX_ROWS)
    assert decision.after < MAX_ROWS
    assert "get no cheaper" in decision.reason


async def test_sizes_that_are_preferred_in_writing_stay(tmp_path: Path) -> None:
    preferring = MODEL + "dynamic_batching { preferred_batch_size: [ 2 ] }\n"
    async with serving(tmp_path, model=preferring) as (app, stub):
        await offer(stub, CAPACITY, 1.5)
        assert app.optimizer is not None
        assert app.optimizer.explain() == []


async def test_who_gets_no_requests_is_not_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, objective="p99=300ms") as (app, stub):
        assert app.optimizer is not None
        await app.optimizer.stop()
        await call(stub, 1)
        (servable,) = app.manager.servables()
        looks: list[str] = []

        async def tick(self: tuned.TunedVersion) -> None:
            looks.append(self.name)

        monkeypatch.setattr(tuned.TunedVersion, "tick", tick)
        own = optimizer.Optimizer(lambda: [servable], cores=1)
        for _ in range(3):
            await own.tick()
        assert looks == ["m"]
        await call(stub, 2)
        await own.tick()
        assert looks == ["m", "m"]


async def test_off_leaves_all_as_written(tmp_path: Path) -> None:
    async with serving(tmp_path, objective="p99=100ms", tuning="off") as (app, stub):
        found = await offer(stub, 2 * CAPACITY, 1.0)
        assert app.optimizer is not None
        assert app.optimizer.explain() == []
    assert {code for code, _, _ in found} == {"OK"}


async def test_instances_follow_their_bounds(tmp_path: Path) -> None:
    async with serving(tmp_path, objective="p99=300ms, instances=1..3") as (app, stub):
        assert app.optimizer is not None
        async with asyncio.timeout(40):
            while not (accounts := app.optimizer.explain("m")) or accounts[0].knobs["instances"] < 2:
                await offer(stub, 1.4 * CAPACITY, 1.0)
        found = await offer(stub, 1.4 * CAPACITY, 2.0)
        (entry,) = app.optimizer._entries.values()
        await app.optimizer.stop()
        assert isinstance(entry.tuned, tuned.TunedVersion)
        entry.tuned.tuner.state = State.STEADY
        had = entry.tuned.claim.instances
        giving = asyncio.create_task(entry.tuned.give_up_instance("more important"))
        assert {code for code, _, _ in await offer(stub, 0.5 * CAPACITY, 1.0)} == {"OK"}
        await giving
        assert (entry.tuned.claim.instances, had <= max(2, count_cpus())) == (had - 1, True)
        assert "higher priority" in entry.tuned.decisions[-1].reason
    decisions = [each for each in accounts[0].decisions if each.knob == "instances"]
    assert (decisions[0].before, decisions[0].after) == (1.0, 2.0)
    assert "miss the objective" in decisions[0].reason or "first look" in decisions[0].reason
    good = sum(code == "OK" and taken_s <= TARGET_S for code, taken_s, _ in found)
    assert good >= 0.9 * len(found)


async def test_what_an_operator_sets_wins_and_holds_while_it_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "READ_S", 0.0)
    said: list[dict[str, dict[str, float]] | AiorchError] = [{"m": {"latency_us": 50_000, "percentile": 95.0}}]

    async def read() -> dict[str, dict[str, float]]:
        if isinstance(said[0], AiorchError):
            raise said[0]
        return said[0]

    async with serving(tmp_path, objective="p99=100ms") as (app, stub):
        own = optimizer.Optimizer(app.manager.servables, cores=1, read_objectives=read)
        await own.tick()
        (account,) = own.explain("m")
        assert str(account.objective) == "p95=50ms"
        said[0] = RegistryUnavailable("away")
        await own.tick()
        assert str(own.explain("m")[0].objective) == "p95=50ms"
        said[0] = {}
        await own.tick()
        assert str(own.explain("m")[0].objective) == "p99=100ms"
        assert (await call(stub, 7))[0] == "OK"


@pytest.mark.parametrize("policy", ["aimd", "linear"])
async def test_rules_of_others_over_the_same_levers(tmp_path: Path, policy: str) -> None:
    async with serving(tmp_path, objective="p99=300ms", tuning=policy) as (app, stub):
        assert app.optimizer is not None
        (servable,) = app.manager.servables()
        assert servable.plain_scheduler is not None
        async with asyncio.timeout(20):
            while not (accounts := app.optimizer.explain("m")) or accounts[0].rate == 0:
                found = await offer(stub, 0.9 * CAPACITY, 1.0)
        policy_now = servable.plain_scheduler.policy()
    assert accounts[0].state == policy
    assert {code for code, _, _ in found} == {"OK"}
    assert policy_now.max_rows == accounts[0].knobs["max_batch_size"] == MAX_ROWS
    assert policy_now.is_shedding == (policy == "linear")
