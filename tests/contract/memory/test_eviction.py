"""A budget, and who has to go for whom: what is in use first."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import grpc
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import InferenceStub
from demand_site import CONFIG, TIMEOUT_S, BallastBackend, configure, running, write_ensemble, write_model

from aiorch_server.errors import MemoryBudgetExceeded

RACE_S = 3.0


async def test_two_models_with_room_for_one_and_eight_clients_lose_no_request(tmp_path: Path) -> None:
    write_model(tmp_path, "a", mib=60, add=1)
    write_model(tmp_path, "b", mib=60, add=100)
    adds = {"a": 1.0, "b": 100.0}
    async with running(
        configure(tmp_path, budget_mib=100, lifecycle={"residence_secs": 0.05, "room_timeout_secs": 10})
    ) as site:
        until = time.monotonic() + RACE_S

        async def call(seed: int) -> int:
            choice, count = random.Random(seed), 0
            while time.monotonic() < until:
                model, value = choice.choice("ab"), float(choice.randrange(1000))
                assert await site.infer(model, value) == value + adds[model]
                count += 1
            return count

        counts = await asyncio.gather(*(call(seed) for seed in range(8)))
        assert min(counts) > 0
        assert min(BallastBackend.loads.values()) > 3, BallastBackend.loads  # they did take turns
        assert len(site.ready()) == 1


async def test_the_least_recently_used_model_goes(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_model(tmp_path, name, mib=40)
    async with running(configure(tmp_path, budget_mib=100)) as site:
        await site.infer("a")
        await site.infer("b")
        await asyncio.sleep(0.01)  # statistics count milliseconds
        await site.infer("a")  # on the compiled path, which tells nobody
        await site.infer("c")
        assert site.ready() == ["a", "c"]
        assert "on demand: evicted to make room for 'c:1'" in site.reason("b")
        assert site.manager.is_ready("b")
        await site.infer("b")
        assert site.ready() == ["b", "c"]


async def test_a_request_under_way_keeps_its_model_and_the_refusal_names_the_budget_and_its_holder(
    tmp_path: Path,
) -> None:
    write_model(tmp_path, "a", mib=60)
    write_model(tmp_path, "b", mib=60)
    async with running(configure(tmp_path, budget_mib=100)) as site:
        long = asyncio.create_task(site.infer("a", -1.0))
        await site.until(lambda: site.ready() == ["a"] and site.manager.find("a").scheduler.in_flight == 1)
        code, text = await site.refuse("b")
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "memory budget is 100 MiB" in text
        assert "'a:1' 60 MiB" in text
        BallastBackend.running.set()
        assert await long == -1.0
        await site.until(lambda: site.manager.is_ready("b"))
        assert await site.infer("b") == 1.0
        assert site.ready() == ["b"]


SEQUENCES = CONFIG.replace(
    "instance_group", "sequence_batching { max_sequence_idle_microseconds: 60000000 } instance_group"
)


async def test_a_sequence_under_way_keeps_its_model(tmp_path: Path) -> None:
    write_model(tmp_path, "a", mib=60, config=SEQUENCES)
    write_model(tmp_path, "b", mib=60)
    async with running(configure(tmp_path, budget_mib=100)) as site:
        stub = InferenceStub(site.channel)

        async def send(*, is_start: bool = False, is_end: bool = False) -> None:
            request = pb.ModelInferRequest(model_name="a")
            request.inputs.add(name="INPUT0", datatype="FP32", shape=[1, 1]).contents.fp32_contents.append(1)
            request.parameters["sequence_id"].int64_param = 7
            request.parameters["sequence_start"].bool_param = is_start
            request.parameters["sequence_end"].bool_param = is_end
            await stub.ModelInfer(request, timeout=TIMEOUT_S)

        await send(is_start=True)
        _, text = await site.refuse("b")
        assert "'a:1' 60 MiB" in text
        await send(is_end=True)
        await site.until(lambda: site.manager.is_ready("b"))
        await site.infer("b")
        assert site.ready() == ["b"]


async def test_a_lease_keeps_its_model(tmp_path: Path) -> None:
    write_model(tmp_path, "a", mib=60)
    write_model(tmp_path, "b", mib=60)
    async with running(configure(tmp_path, budget_mib=100)) as site:
        await site.infer("a")
        with site.manager.acquire("a"):
            await site.refuse("b")
            assert site.ready() == ["a"]
        await site.until(lambda: site.manager.is_ready("b"))
        await site.infer("b")


async def test_who_comes_while_a_model_drains_waits_and_is_answered(tmp_path: Path) -> None:
    write_model(tmp_path, "a", mib=60, add=1)
    write_model(tmp_path, "b", mib=60, add=2)
    async with running(configure(tmp_path, budget_mib=100, lifecycle={"room_timeout_secs": 10})) as site:
        await site.infer("a")
        lease = site.manager.acquire("a")
        other = asyncio.create_task(site.infer("b"))  # waits for the lease
        await site.until(lambda: site.manager._models["b"].waiters == 1)
        assert await site.infer("a") == 2.0
        lease.release()
        again = [asyncio.create_task(site.infer("a", value)) for value in range(5)]
        assert await other == 3.0
        assert await asyncio.gather(*again) == [value + 1.0 for value in range(5)]


async def test_a_model_that_is_always_loaded_is_never_evicted(tmp_path: Path) -> None:
    write_model(tmp_path, "always", mib=60)
    write_model(tmp_path, "m", mib=60)
    async with running(
        configure(tmp_path, budget_mib=100, on_demand=("m",), lifecycle={"room_timeout_secs": 60})
    ) as site:
        began = time.monotonic()
        code, text = await site.refuse("m")
        assert (code, "taken by 'always:1' 60 MiB" in text) == (grpc.StatusCode.UNAVAILABLE, True)
        assert time.monotonic() - began < 10  # nobody can go: no reason to wait
        assert await site.infer("always") == 1.0


async def test_a_model_larger_than_the_budget_evicts_nobody(tmp_path: Path) -> None:
    write_model(tmp_path, "small", mib=10)
    write_model(tmp_path, "huge", mib=200)
    async with running(configure(tmp_path, budget_mib=100, lifecycle={"room_timeout_secs": 60})) as site:
        await site.infer("small")
        code, text = await site.refuse("huge")
        assert (code, "it needs 200 MiB" in text) == (grpc.StatusCode.UNAVAILABLE, True)
        assert site.ready() == ["small"]


async def test_a_load_call_makes_room_too_and_is_refused_where_there_is_none(tmp_path: Path) -> None:
    for name in ("a", "x", "y"):
        write_model(tmp_path, name, mib=60)
    config = configure(tmp_path, budget_mib=100, on_demand=("a",), lifecycle={"control_mode": "explicit"})
    async with running(config) as site:
        await site.infer("a")
        await site.manager.load("x")
        assert site.ready() == ["x"]
        with pytest.raises(MemoryBudgetExceeded, match=r"no room for 'y:1'.*'x:1' 60 MiB"):
            await site.manager.load("y")
        await site.manager.unload("x")
        await site.manager.load("y")
        assert site.ready() == ["y"]


async def test_a_model_stays_for_a_while(tmp_path: Path) -> None:
    write_model(tmp_path, "a", mib=60)
    write_model(tmp_path, "b", mib=60)
    config = configure(tmp_path, budget_mib=100, lifecycle={"residence_secs": 0.5, "room_timeout_secs": 10})
    async with running(config) as site:
        await site.infer("a")
        began = time.monotonic()
        await site.infer("b")
        assert time.monotonic() - began > 0.4


async def test_an_ensemble_goes_before_its_steps_and_keeps_them_while_it_is_in_use(tmp_path: Path) -> None:
    write_model(tmp_path, "step", mib=60, add=1)
    write_model(tmp_path, "other", mib=60)
    write_ensemble(tmp_path, "both", "step", "step")
    async with running(configure(tmp_path, budget_mib=100)) as site:
        assert await site.infer("both") == 3.0
        with site.manager.acquire("both"):
            await site.refuse("other")
            assert site.ready() == ["both", "step"]
        await site.until(lambda: site.manager.is_ready("other"))
        await site.infer("other")
        assert site.ready() == ["other"]
        assert await site.infer("both") == 3.0
        assert site.ready() == ["both", "step"]


async def test_an_ensemble_that_is_always_loaded_keeps_its_steps(tmp_path: Path) -> None:
    write_model(tmp_path, "step", mib=60, add=1)
    write_model(tmp_path, "other", mib=60)
    write_ensemble(tmp_path, "both", "step")
    async with running(configure(tmp_path, budget_mib=100, on_demand=("step", "other"))) as site:
        assert site.ready() == ["both", "step"]
        _, text = await site.refuse("other")
        assert "'step:1' 60 MiB" in text
        assert await site.infer("both") == 2.0


async def test_steps_that_came_with_an_ensemble_alone_go_with_it(tmp_path: Path) -> None:
    write_model(tmp_path, "step", mib=60, add=1)
    write_model(tmp_path, "other", mib=60)
    write_ensemble(tmp_path, "both", "step")
    config = configure(tmp_path, budget_mib=100, on_demand=("both", "other"), lifecycle={"control_mode": "explicit"})
    async with running(config) as site:
        assert await site.infer("both") == 2.0
        await site.infer("other")
        assert site.ready() == ["other"]
        assert await site.infer("step") == 2.0  # it was there once: it may not fail now
        assert await site.infer("both") == 2.0


async def test_two_ensembles_that_take_turns_never_hold_half_of_the_room_each(tmp_path: Path) -> None:
    for name in ("a1", "a2", "b1", "b2"):
        write_model(tmp_path, name, mib=40, add=1)
    write_ensemble(tmp_path, "a", "a1", "a2")
    write_ensemble(tmp_path, "b", "b1", "b2")
    config = configure(tmp_path, budget_mib=100, lifecycle={"room_timeout_secs": 10})
    async with running(config) as site:
        for _ in range(3):
            assert await asyncio.gather(*(site.infer(name) for name in "abab")) == [3.0] * 4
