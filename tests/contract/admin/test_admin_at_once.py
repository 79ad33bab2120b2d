"""A change of who may do what holds when its answer is there, on the server that made it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiorch_proto.admin.v1 import access_pb2 as pb
from aiorch_proto.admin.v1.service import AdminStub
from running_site import encode_values
from secured import DOORS, INFER, Secured, key_of, serve_secured, write_models

from aiorch_server.security.api_keys import NewKey


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


@asynccontextmanager
async def serve(models: Path, folder: Path, door: str) -> AsyncIterator[tuple[Secured, AdminStub]]:
    registry = {"url": f"sqlite:///{folder}/r.db", "artefacts": f"{folder}/a", "min_free_bytes": 0}
    async with serve_secured(models, door, registry=registry) as site:
        gate: Any = site.application._gate

        async def never() -> None:
            await asyncio.Event().wait()

        gate.look = never  # nobody looks by the clock
        yield site, AdminStub(site.channel)


def as_root() -> dict[str, Any]:
    return {"metadata": [("authorization", f"Bearer {key_of('root')}")], "timeout": 20}


async def make(admin: AdminStub, principal: str) -> tuple[str, NewKey]:
    answer = await admin.Access.CreateApiKey(pb.CreateApiKeyRequest(principal=principal), **as_root())
    return answer.key.id, NewKey(answer.key.id, answer.secret, b"")


@pytest.mark.parametrize("door", DOORS)
async def test_grants_and_revocations_hold_at_once(models: Path, door: str, tmp_path: Path) -> None:
    async with serve(models, tmp_path, door) as (site, admin):
        id, key = await make(admin, "dora")
        for _ in range(5):
            assert (await site.infer(key)).text.endswith("is not found")
            granted = await admin.Access.GrantRole(
                pb.GrantRoleRequest(principal="dora", role=pb.ROLE_CLIENT, models="own-*"), **as_root()
            )
            assert [(await site.infer(key)).code for _ in range(3)] == ["OK"] * 3
            await admin.Access.RevokeRole(pb.RevokeRoleRequest(id=granted.id), **as_root())
        await admin.Access.GrantRole(
            pb.GrantRoleRequest(principal="dora", role=pb.ROLE_CLIENT, models="*"), **as_root()
        )
        ended = pb.SetQuotaRequest(quota=pb.Quota(tenant="dora", requests_per_s=0.001))
        await admin.Access.SetQuota(ended, **as_root())
        assert [(await site.infer(key)).code for _ in range(3)] == ["OK", *["RESOURCE_EXHAUSTED"] * 2]
        lifted = pb.SetQuotaRequest(quota=pb.Quota(tenant="dora"), update_mask={"paths": ["requests_per_s"]})
        await admin.Access.SetQuota(lifted, **as_root())
        assert (await site.infer(key)).code == "OK"
        await admin.Access.RevokeApiKey(pb.RevokeApiKeyRequest(id=id), **as_root())
        assert (await site.infer(key)).code == "UNAUTHENTICATED"


async def test_also_where_the_caller_has_gone(models: Path, tmp_path: Path) -> None:
    async with serve(models, tmp_path, "native-1") as (site, admin):
        id, key = await make(admin, "dora")
        assert (await site.ask("GET", "/v2", key)).status_code == 200
        gate: Any = site.application._gate
        note = gate.note_change
        begun, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def note_late() -> None:
            begun.set()
            await go_on.wait()
            await note()
            ended.set()

        gate.note_change = note_late
        call = admin.Access.RevokeApiKey(pb.RevokeApiKeyRequest(id=id), **as_root())
        async with asyncio.timeout(20):
            await begun.wait()
            call.cancel()
            await asyncio.sleep(0.1)  # time for it to be heard of
            go_on.set()
            await ended.wait()
        assert (await site.ask("GET", "/v2", key)).status_code == 401


@pytest.mark.parametrize("door", DOORS)
async def test_a_stream_ends_at_once(models: Path, door: str, tmp_path: Path) -> None:
    async with serve(models, tmp_path, door) as (site, admin):
        await admin.Access.GrantRole(
            pb.GrantRoleRequest(principal="dora", role=pb.ROLE_CLIENT, models="*"), **as_root()
        )
        id, key = await make(admin, "dora")
        stream = site.channel.stream_stream(INFER.replace("ModelInfer", "ModelStreamInfer"))(
            metadata=[("authorization", f"Bearer {key.text}")], timeout=20
        )
        await stream.write(encode_values([1.0], "own-one"))
        assert await stream.read()
        await admin.Access.RevokeApiKey(pb.RevokeApiKeyRequest(id=id), **as_root())
        await stream.write(encode_values([1.0], "own-one"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code().name == "UNAUTHENTICATED"
