"""Long calls: each request is judged by its own model, and by what holds by then."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from grpc_reflection.v1alpha import reflection_pb2
from running_site import encode_values
from secured import DOORS, KEYS, SERVICE, TIMEOUT_S, Secured, serve_secured

from aiorch_server.security.identity import RoleBinding
from aiorch_server.security.roles import Role

STREAM = f"{SERVICE}/ModelStreamInfer"


class Stream:
    """A stream of requests that the test sends one by one."""

    def __init__(self, site: Secured, caller: str, path: str = STREAM) -> None:
        metadata = [("authorization", f"Bearer {KEYS[caller].text}")]
        self.call = site.channel.stream_stream(path)(metadata=metadata, timeout=TIMEOUT_S)

    async def ask(self, model: str) -> pb.ModelStreamInferResponse:
        await self.call.write(encode_values([1.0, 2.0], model))
        return pb.ModelStreamInferResponse.FromString(await self.call.read())

    async def end(self) -> tuple[str, str]:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await self.call.read() is not grpc.aio.EOF:
                pass
        return (await self.call.code()).name, await self.call.details()


@pytest.mark.parametrize("door", DOORS)
async def test_each_request_is_judged_by_its_own_model(models: Path, door: str) -> None:
    async with serve_secured(models, door, security={"bindings": [
        {"principal": "client", "role": "client", "models": "own-*"},
        {"principal": "client", "role": "viewer", "models": "other-*"},
    ]}) as site:  # fmt: skip
        stream = Stream(site, "client")
        assert not (await stream.ask("own-one")).error_message
        refused = await stream.ask("other-one")
        assert refused.error_message == (f"'client' needs the role client on model 'other-one' for {STREAM}")
        assert not refused.infer_response.outputs
        assert (await stream.ask("nothing")).error_message == "Request for unknown model: 'nothing' is not found"
        assert not (await stream.ask("own-one")).error_message
        await stream.call.done_writing()
        assert await stream.end() == ("OK", "")


@pytest.mark.parametrize("door", DOORS)
async def test_a_stream_without_requests(models: Path, door: str) -> None:
    async with serve_secured(models, door) as site:
        stream = Stream(site, "client")
        await stream.call.done_writing()
        assert await stream.end() == ("OK", "")


@pytest.mark.parametrize("door", DOORS)
async def test_a_stream_ends_when_its_callers_credentials_do(models: Path, door: str) -> None:
    async with serve_secured(models, door) as site:
        gate: Any = site.application._gate
        stream = Stream(site, "client")
        assert not (await stream.ask("own-one")).error_message
        del gate._authenticators[0]._fixed[KEYS["client"].id]  # revoked
        assert not (await stream.ask("own-one")).error_message, "nobody has told the gate yet"
        gate.forget()
        await stream.call.write(encode_values([1.0, 2.0], "own-one"))
        assert await stream.end() == ("UNAUTHENTICATED", "the API key is unknown or revoked")


@pytest.mark.parametrize("door", DOORS)
async def test_a_stream_ends_when_its_callers_credentials_expire(models: Path, door: str) -> None:
    async with serve_secured(models, door) as site:
        gate: Any = site.application._gate
        authenticator = gate._authenticators[0]
        known = authenticator._fixed[KEYS["client"].id]
        now = time.time_ns()
        authenticator._fixed[known.id] = dataclasses.replace(known, expires_ns=now + 10**9)
        stream = Stream(site, "client")
        assert not (await stream.ask("own-one")).error_message
        gate._clock = lambda: now + 2 * 10**9
        await stream.call.write(encode_values([1.0, 2.0], "own-one"))
        assert await stream.end() == ("UNAUTHENTICATED", "the credentials have expired")
        answer = await site.infer("client")
        assert (answer.code, answer.text) == ("UNAUTHENTICATED", "the credentials have expired")


async def test_a_role_that_is_taken_away(models: Path) -> None:
    async with serve_secured(models) as site:
        gate: Any = site.application._gate
        stream = Stream(site, "client")
        assert not (await stream.ask("own-one")).error_message
        gate._policy._fixed = (RoleBinding("client", Role.VIEWER),)
        gate._policy.replace(())
        gate.forget()
        assert "needs the role client" in (await stream.ask("own-one")).error_message


@pytest.mark.parametrize("door", DOORS)
async def test_reflection_is_for_any_caller_who_is_known(models: Path, door: str) -> None:
    async with serve_secured(models, door) as site:
        message = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
        path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        assert (await site.call(path, message)).code == "UNAUTHENTICATED"
        found = reflection_pb2.ServerReflectionResponse.FromString((await site.call(path, message, "nothing")).data)
        assert "inference.GRPCInferenceService" in str(found)


@pytest.mark.parametrize("door", DOORS)
async def test_who_watches_health_is_not_asked(models: Path, door: str) -> None:
    async with serve_secured(models, door) as site:
        call = site.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=TIMEOUT_S)
        assert await call.read() == b"\x08\x01"
        site.application._gate.forget()  # type: ignore[union-attr]
        call.cancel()


async def test_an_answer_that_nobody_has_asked_for_is_held_back(models: Path) -> None:
    """A call that names a model, and whose code forgets to ask who may see it, answers nothing."""
    async with serve_secured(models) as site:
        control: Any = site.application.controlplane
        control.repository_index = lambda ready_only=False: []
        answer = await site.call(f"{SERVICE}/RepositoryIndex", b"", "root")
        assert (answer.code, answer.data) == ("INTERNAL", b"") and "held back" in answer.text
        listed = await site.ask("POST", "/v2/repository/index", "root")
        assert listed.status_code == 500 and "held back" in listed.text


async def test_calls_of_a_stream_run_at_once(models: Path) -> None:
    """The gate is asked before each request, and holds none of them up."""

    async def send(stream: Stream) -> AsyncIterator[str]:
        for _ in range(50):
            await stream.call.write(encode_values([1.0, 2.0], "own-one"))
        await stream.call.done_writing()
        while (answer := await stream.call.read()) is not grpc.aio.EOF:
            yield pb.ModelStreamInferResponse.FromString(answer).error_message

    async with serve_secured(models) as site, asyncio.timeout(TIMEOUT_S):
        assert [each async for each in send(Stream(site, "client"))] == [""] * 50
