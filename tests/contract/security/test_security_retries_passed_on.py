"""Refusals for time or room reach callers through ensembles, streams and the cache, and nothing is lost on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiorch_proto.v2 import inference_pb2
from ensembles import write_ensemble
from running_site import encode_values
from secured import DOORS, IDENTITY, INFER, SERVICE, Answer, Secured, serve_secured, write_models

from aiorch_server._core import Scheduler

LONG = "preferred_batch_size: [8] max_queue_delay_microseconds: 60000000 "
V2 = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]}
STREAM = f"{SERVICE}/ModelStreamInfer"


@asynccontextmanager
async def serve_slow(
    tmp_path: Path, door: str, queue: str = "", config: str = "", **more: object
) -> AsyncIterator[tuple[Secured, Scheduler]]:
    root = write_models(tmp_path)
    text = IDENTITY.replace("max_queue_delay_microseconds: 100", LONG + queue) + config
    (root / "own-one" / "config.pbtxt").write_text(text)
    write_ensemble(root, "own-chain", (("own-one", {"INPUT0": "IN"}, {"OUTPUT0": "OUT"}),))
    async with serve_secured(root, door, **more) as site:
        (servable,) = [each for each in site.application.manager.servables() if each.name == "own-one"]
        assert isinstance(servable.scheduler, Scheduler)
        yield site, servable.scheduler
        assert servable.scheduler.wait_idle(20.0), "nothing is left behind"


async def reach(scheduler: Scheduler, waiting: int) -> None:
    async with asyncio.timeout(20):
        while scheduler.pending != waiting:
            await asyncio.sleep(0.005)


def ask_chain(site: Secured, caller: str) -> asyncio.Task[Answer]:
    message = inference_pb2.ModelInferRequest.FromString(encode_values([1.0, 2.0], "own-chain"))
    message.inputs[0].name = "IN"
    return asyncio.create_task(site.call(INFER, message.SerializeToString(), caller))


@pytest.mark.parametrize("door", DOORS)
async def test_through_an_ensemble(tmp_path: Path, door: str) -> None:
    async with serve_slow(tmp_path, door, "default_queue_policy { max_queue_size: 2 }") as (site, scheduler):
        asking = [ask_chain(site, "client")]
        await reach(scheduler, 1)
        asking.append(ask_chain(site, "client"))
        await reach(scheduler, 2)
        refused = await ask_chain(site, "client")
        assert (refused.code, refused.trailing["grpc-retry-pushback-ms"]) == ("UNAVAILABLE", "1000"), refused.text
        assert "in ensemble 'own-chain'" in refused.text and "Exceeds maximum queue size" in refused.text
        other = ask_chain(site, "deployer")
        displaced = await asyncio.wait_for(asking[1], 20)
        assert "made way in the queue" in displaced.text and displaced.trailing["grpc-retry-pushback-ms"] == "1000"
        scheduler.set_policy(max_rows=4, target_us=1_000_000, is_shedding=True, instances=1, curve=[(1, 3_000_000_000)])
        late = await site.ask("POST", "/v2/models/own-chain/infer", "admin", json=V2)
        assert late.status_code == 503 and "cannot be answered in time" in late.text
        assert int(late.headers["retry-after"]) >= 2, "of the step, by its own times"
        scheduler.set_policy(delay_us=0, is_shedding=False)
        assert [(await each).code for each in (asking[0], other)] == ["OK", "OK"]


@pytest.mark.parametrize("door", DOORS)
async def test_through_a_stream(tmp_path: Path, door: str) -> None:
    async with serve_slow(tmp_path, door) as (site, scheduler):
        waiting = asyncio.create_task(site.infer("client"))
        await reach(scheduler, 1)
        scheduler.set_policy(max_rows=4, target_us=1_000_000, is_shedding=True, instances=1, curve=[(1, 3_000_000_000)])
        message = encode_values([1.0, 2.0], "own-one")
        told = await site.call(STREAM, message, "client", metadata=[("triton_grpc_error", "true")])
        assert told.code == "UNAVAILABLE" and int(told.trailing["grpc-retry-pushback-ms"]) >= 1000
        assert "grpc-status-details-bin" in told.trailing
        within = await site.call(STREAM, message, "client")
        error = inference_pb2.ModelStreamInferResponse.FromString(within.data).error_message
        assert within.code == "OK" and "cannot be answered in time" in error and "try again in" in error
        scheduler.set_policy(delay_us=0, is_shedding=False)
        assert (await waiting).code == "OK"


async def test_through_the_cache(tmp_path: Path) -> None:
    """Whoever waits for another's equal request does not share its fate: each is answered once, the refused one too."""
    cached = "response_cache { enable: true }"
    queue = "default_queue_policy { max_queue_size: 3 }"
    async with serve_slow(tmp_path, "native-1", queue, cached, cache={"kind": "local"}) as (site, scheduler):
        asking = []
        for value in (1.0, 2.0, 3.0):
            message = encode_values([value, value], "own-one")
            asking.append(asyncio.create_task(site.call(INFER, message, "client")))
            await reach(scheduler, len(asking))
        follower = asyncio.create_task(site.call(INFER, message, "deployer"))
        other = asyncio.create_task(site.call(INFER, encode_values([4.0, 4.0], "own-one"), "admin"))
        found = await asyncio.wait_for(asking[2], 20)
        assert found.code == "UNAVAILABLE" and "made way" in found.text
        found = await asyncio.wait_for(asking[1], 20)
        assert found.code == "UNAVAILABLE" and "made way" in found.text, "for who had waited for the other's answer"
        scheduler.set_policy(delay_us=0)
        answers = await asyncio.wait_for(asyncio.gather(asking[0], follower, other), 20)
        for answer, value in zip(answers, (1.0, 3.0, 4.0), strict=True):
            assert answer.code == "OK", answer.text
            (content,) = inference_pb2.ModelInferResponse.FromString(answer.data).raw_output_contents
            assert (
                content
                == inference_pb2.ModelInferRequest.FromString(
                    encode_values([value, value], "own-one")
                ).raw_input_contents[0]
            )
