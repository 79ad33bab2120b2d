"""A refusal for time or room says when to come back, in the same way at each door: raw clients look."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiorch_client.errors import from_status
from google.rpc import error_details_pb2, status_pb2
from running_site import encode_values
from secured import DOORS, IDENTITY, Answer, Secured, serve_secured, write_models

from aiorch_server._core import Scheduler

PUSHBACK = "grpc-retry-pushback-ms"
DETAILS = "grpc-status-details-bin"
LONG = "preferred_batch_size: [8] max_queue_delay_microseconds: 60000000 "
#: Queries that the compiled desk carries, and that the Python plane does.
PLANES: dict[str, dict[str, Any]] = {"desk": {}, "plane": {"metadata": [("aiorch-timing", "1")]}}
V2 = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]}


def check_hint(answer: Answer) -> float:
    """Both ways say the same; the pause in seconds."""
    status = status_pb2.Status.FromString(answer.trailing[DETAILS])
    assert (grpc.StatusCode[answer.code].value[0], answer.text) == (status.code, status.message)
    (detail,) = status.details
    retry = error_details_pb2.RetryInfo()
    assert detail.Unpack(retry)
    pause_ns: int = retry.retry_delay.ToNanoseconds()
    assert pause_ns > 0
    assert int(answer.trailing[PUSHBACK]) == -(-pause_ns // 1_000_000)
    error = from_status(grpc.StatusCode[answer.code], answer.text, tuple(answer.trailing.items()))
    assert error.retryable and error.retry_after_s == pytest.approx(pause_ns / 1e9, abs=0.001)
    return pause_ns / 1e9


def scheduler_of(site: Secured) -> Scheduler:
    (servable,) = [each for each in site.application.manager.servables() if each.name == "own-one"]
    assert isinstance(servable.scheduler, Scheduler)
    return servable.scheduler


@asynccontextmanager
async def serve_waiting(
    tmp_path: Path, door: str, queue: str, *, prepare: Callable[[Scheduler], None] = lambda _: None, **more: Any
) -> AsyncIterator[tuple[Secured, asyncio.Task[Answer]]]:
    """A model whose one request waits, and what came of it."""
    root = write_models(tmp_path)
    config = IDENTITY.replace("max_queue_delay_microseconds: 100", LONG + queue)
    (root / "own-one" / "config.pbtxt").write_text(config)
    async with serve_secured(root, door, **more) as site:
        scheduler = scheduler_of(site)
        prepare(scheduler)
        waiting = asyncio.create_task(site.infer("client"))
        async with asyncio.timeout(20):
            while not scheduler.pending:
                await asyncio.sleep(0.005)
        yield site, waiting
        scheduler.set_policy(delay_us=0, is_shedding=False)
        await waiting


@pytest.mark.parametrize("door", DOORS)
async def test_a_full_queue_tells_a_time(tmp_path: Path, door: str) -> None:
    async with serve_waiting(tmp_path, door, "default_queue_policy { max_queue_size: 1 }") as (site, waiting):
        for plane in PLANES.values():
            for _ in range(2):  # the first has no pass yet
                refused = await site.infer("client", **plane)
                assert refused.code == "UNAVAILABLE" and refused.text.endswith("Exceeds maximum queue size")
                assert check_hint(refused) == 1.0, "nothing has run yet: a usual pause"
        over_rest = await site.ask("POST", "/v2/models/own-one/infer", "client", json=V2)
        assert over_rest.status_code == 503 and over_rest.headers["retry-after"] == "1"
        assert not waiting.done()
    assert waiting.result().code == "OK"


@pytest.mark.parametrize("door", DOORS)
async def test_what_would_be_late_tells_a_time(tmp_path: Path, door: str) -> None:
    def prepare(scheduler: Scheduler) -> None:
        scheduler.set_policy(max_rows=4, target_us=1_000_000, is_shedding=True, instances=1, curve=[(1, 3_000_000_000)])

    async with serve_waiting(tmp_path, door, "", prepare=prepare) as (site, _):
        for plane in PLANES.values():
            refused = await site.infer("client", **plane)
            assert refused.code == "UNAVAILABLE" and "cannot be answered in time" in refused.text
            assert 1.0 < check_hint(refused) <= 3.0
            words = re.search(r"try again in (\d+\.\d+) s", refused.text)
            assert words is not None and float(words[1]) == int(refused.trailing[PUSHBACK]) / 1000


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("plane", sorted(PLANES))
async def test_whose_time_in_the_queue_is_over_is_told_a_time(tmp_path: Path, door: str, plane: str) -> None:
    queue = "default_queue_policy { default_timeout_microseconds: 50000 }"
    async with serve_waiting(tmp_path, door, queue) as (site, waiting):
        assert (await waiting).text.endswith("Request timeout expired")
        refused = await site.infer("client", **PLANES[plane])
        assert refused.code == "UNAVAILABLE" and refused.text.endswith("Request timeout expired")
        check_hint(refused)
        over_rest = await site.ask("POST", "/v2/models/own-one/infer", "client", json=V2)
        assert over_rest.status_code == 503 and int(over_rest.headers["retry-after"]) >= 1


@pytest.mark.parametrize("door", DOORS)
async def test_who_makes_way_is_told_a_time(tmp_path: Path, door: str) -> None:
    """The other tenant's request takes the place of the newest of two, each time; nobody is left without an answer."""
    async with serve_waiting(tmp_path, door, "default_queue_policy { max_queue_size: 2 }") as (site, first):
        second = asyncio.create_task(site.infer("client"))
        async with asyncio.timeout(20):
            while scheduler_of(site).pending < 2:
                await asyncio.sleep(0.005)
        for plane in PLANES.values():
            other = asyncio.create_task(site.infer("deployer", **plane))
            displaced = await asyncio.wait_for(second, 20)
            assert displaced.code == "UNAVAILABLE" and "made way in the queue" in displaced.text
            assert check_hint(displaced) == 1.0
            other.cancel()
            await asyncio.gather(other, return_exceptions=True)
            async with asyncio.timeout(20):
                while scheduler_of(site).pending != 1:
                    await asyncio.sleep(0.005)
            second = asyncio.create_task(site.infer("client", **plane))
            async with asyncio.timeout(20):
                while scheduler_of(site).pending != 2:
                    await asyncio.sleep(0.005)
        refused = await site.infer("client")
        assert refused.text.endswith("Exceeds maximum queue size"), "who holds it all displaces nobody"
        over_rest = asyncio.create_task(site.ask("POST", "/v2/models/own-one/infer", "admin", json=V2))
        assert "made way" in (await asyncio.wait_for(second, 20)).text, "over REST too"
        scheduler_of(site).set_policy(delay_us=0)
        assert (await over_rest).status_code == 200
    assert first.result().code == "OK"


@pytest.mark.parametrize("door", DOORS)
async def test_quotas_tell_a_time_by_each_bound(tmp_path: Path, door: str) -> None:
    quotas = [{"tenant": "client", "requests_per_s": 0.02}, {"tenant": "deployer", "max_in_flight": 1}]
    async with serve_waiting(tmp_path, door, "", security={"quotas": quotas}) as (site, _):
        in_flight = asyncio.create_task(site.infer("deployer"))
        async with asyncio.timeout(20):
            while scheduler_of(site).pending < 2:
                await asyncio.sleep(0.005)
        for plane in PLANES.values():
            rate, flight = await site.infer("client", **plane), await site.infer("deployer", **plane)
            assert rate.code == flight.code == "RESOURCE_EXHAUSTED"
            assert 20 < check_hint(rate) <= 50 and check_hint(flight) == 1.0
        over_rest = await site.ask("POST", "/v2/models/own-one/infer", "deployer", json=V2)
        assert over_rest.status_code == 429 and over_rest.headers["retry-after"] == "1"
        scheduler_of(site).set_policy(delay_us=0)
        assert (await in_flight).code == "OK"


@pytest.mark.parametrize("door", DOORS)
async def test_what_cannot_be_tried_again_says_nothing(tmp_path: Path, door: str) -> None:
    async with serve_waiting(tmp_path, door, "") as (site, _):
        wrong = await site.call("/inference.GRPCInferenceService/ModelInfer", encode_values([1.0], "own-no"), "client")
        assert wrong.code not in ("OK", "UNAVAILABLE") and not {PUSHBACK, DETAILS} & wrong.trailing.keys()
        over_rest = await site.ask("POST", "/v2/models/own-no/infer", "client", json=V2)
        assert "retry-after" not in over_rest.headers
