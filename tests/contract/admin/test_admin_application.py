"""The whole server with a registry: what is uploaded and deployed serves, and what the gate refuses is written down."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from admin_site import TIMEOUT_S, make_header, pack, read_details, refused, stream
from aiorch_proto.admin.v1 import access_pb2, audit_pb2, deployments_pb2, registry_pb2
from aiorch_proto.admin.v1.service import AdminStub
from aiorch_proto.v2 import inference_pb2
from aiorch_proto.v2.service import InferenceStub

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig
from aiorch_server.security.api_keys import make_key

CONFIG = b"""
backend: "identity" max_batch_size: 0
input { name: "A" data_type: TYPE_FP32 dims: [1] } output { name: "X" data_type: TYPE_FP32 dims: [1] }
"""
ARCHIVE = pack({"config.pbtxt": CONFIG, "1/empty": b""})


@asynccontextmanager
async def serve(folder: Path, door: str, **sections: Any) -> AsyncIterator[SimpleNamespace]:
    transport, _, threads = door.partition("-")
    (folder / "models").mkdir(exist_ok=True)
    config = {
        "grpc": {"port": 0, "transport": transport, "io_threads": int(threads or 1)},
        "http": {"enabled": False},
        "metrics": {"enabled": False},
        "repository": {"paths": [str(folder / "models")]},
        "execution": {"backends": ["aiorch_backends.identity:IdentityBackend"]},
        "registry": {
            "url": f"sqlite:///{folder}/registry.db",
            "artefacts": str(folder / "artefacts"),
            "cache_folder": str(folder / "cache"),
            "min_free_bytes": 0,
        },
        **sections,
    }
    async with Application(ServerConfig.model_validate(config)) as application:
        target = f"127.0.0.1:{application.grpc_port}"
        async with grpc.aio.insecure_channel(target) as channel:
            yield SimpleNamespace(
                application=application, channel=channel, admin=AdminStub(channel), infer=InferenceStub(channel)
            )


async def upload(site: SimpleNamespace, model: str = "digits", **options: Any) -> registry_pb2.ModelVersion:
    header = make_header(model, ARCHIVE, create_model=True)
    return await site.admin.ModelRegistry.UploadVersion(stream(ARCHIVE, header), **options)


async def infer(site: SimpleNamespace, value: float, **options: Any) -> float:
    request = inference_pb2.ModelInferRequest(model_name="digits")
    request.inputs.add(name="A", datatype="FP32", shape=[1])
    request.raw_input_contents.append(struct.pack("<f", value))
    answer = await site.infer.ModelInfer(request, timeout=TIMEOUT_S, **options)
    (found,) = struct.unpack("<f", answer.raw_output_contents[0])
    return float(found)


async def wait_ready(site: SimpleNamespace, watch: Any) -> None:
    """Until events tell that the rollout has ended."""
    async with asyncio.timeout(TIMEOUT_S):
        while (await watch.read()).kind != "rollout.ended":
            pass


async def test_from_an_archive_to_an_answer(door: str, tmp_path: Path) -> None:
    async with serve(tmp_path, door) as site:
        watch = site.admin.Deployments.WatchEvents(deployments_pb2.WatchEventsRequest())
        assert (await upload(site)).version == 1
        await site.admin.Deployments.Deploy(deployments_pb2.DeployRequest(model="digits"))
        await wait_ready(site, watch)
        assert await infer(site, 1.5) == 1.5
        found = await site.admin.Deployments.GetDeployment(deployments_pb2.GetDeploymentRequest(model="digits"))
        assert found.version == 1
        await site.application.stop()
        error, _ = await refused(exhaust(watch))
        assert error.code().name == "UNAVAILABLE"
    async with serve(tmp_path, door) as site:
        assert await infer(site, 2.5) == 2.5


async def test_what_was_deployed_is_there_wherever_the_server_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a folder in the settings the artefacts are beside SQLite's file, not where the server was started."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    registry = {"url": f"sqlite:///{tmp_path}/record/registry.db", "min_free_bytes": 0}
    monkeypatch.chdir(first)
    async with serve(tmp_path, "grpcio", registry=registry) as site:
        watch = site.admin.Deployments.WatchEvents(deployments_pb2.WatchEventsRequest())
        await upload(site)
        await site.admin.Deployments.Deploy(deployments_pb2.DeployRequest(model="digits"))
        await wait_ready(site, watch)
        watch.cancel()
    monkeypatch.chdir(second)
    async with serve(tmp_path, "grpcio", registry=registry) as site:
        assert await infer(site, 2.5) == 2.5
    assert {each.name for each in (tmp_path / "record").iterdir()} >= {"registry.db", "artefacts"}
    assert [each.name for each in first.iterdir()] == ["artefacts-cache"]


async def exhaust(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def headers(text: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {text}"),), "timeout": TIMEOUT_S}


async def test_callers_and_keys(door: str, tmp_path: Path) -> None:
    """Keys and roles of the registry open what they grant; what the gate refuses has details, and is written down."""
    root = make_key()
    security = {
        "enabled": True,
        "api_keys": [{"id": root.id, "sha256": root.sha256.hex(), "principal": "root"}],
        "bindings": [{"principal": "root", "role": "admin"}],
    }
    async with serve(tmp_path, door, security=security) as site:
        access = site.admin.Access
        error, details = await refused(upload(site))
        assert (error.code().name, details["ErrorInfo"].reason) == ("UNAUTHENTICATED", "NOT_AUTHENTICATED")
        request = access_pb2.CreateApiKeyRequest(principal="robot")
        robot = (await access.CreateApiKey(request, **headers(root.text))).secret
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await access.CreateApiKey(request, **headers(robot))
        assert raised.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert read_details(raised.value)["ErrorInfo"].reason == "PERMISSION_DENIED"
        error, _ = await refused(upload(site, **headers(robot)))
        assert (error.code().name, error.details()) == ("NOT_FOUND", "model 'digits' is not registered")
        grant = access_pb2.GrantRoleRequest(principal="robot", role=access_pb2.ROLE_DEPLOYER, models="digits")
        await access.GrantRole(grant, **headers(root.text))
        async with asyncio.timeout(TIMEOUT_S):  # each server looks for changes now and then
            while not (await access.WhoAmI(access_pb2.WhoAmIRequest(), **headers(robot))).bindings:
                await asyncio.sleep(0.05)
        assert (await upload(site, **headers(robot))).created_by == "robot"
        error, _ = await refused(upload(site, "letters", **headers(robot)))
        assert error.code().name == "NOT_FOUND"
        answer = await site.admin.Audit.QueryAudit(audit_pb2.QueryAuditRequest(principal="robot"), **headers(root.text))
        assert [(entry.method.rpartition("/")[2], entry.outcome) for entry in answer.entries] == [
            ("UploadVersion", "NOT_FOUND"),
            ("UploadVersion", "OK"),
            ("UploadVersion", "NOT_FOUND"),
            ("CreateApiKey", "PERMISSION_DENIED"),
        ]


async def test_without_a_registry_nobody_answers(door: str, tmp_path: Path) -> None:
    async with serve(tmp_path, door, registry={}) as site:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await site.admin.ModelRegistry.ListModels(registry_pb2.ListModelsRequest())
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("taken", ["role", "key"])
async def test_an_upload_ends_with_the_role_that_let_it_in(door: str, tmp_path: Path, taken: str) -> None:
    """However late that is: when all pieces have come, and the stream has not ended yet."""
    root = make_key()
    security = {
        "enabled": True,
        "api_keys": [{"id": root.id, "sha256": root.sha256.hex(), "principal": "root"}],
        "bindings": [{"principal": "root", "role": "admin"}],
    }
    async with serve(tmp_path, door, security=security) as site:
        access = site.admin.Access
        made = await access.CreateApiKey(access_pb2.CreateApiKeyRequest(principal="robot"), **headers(root.text))
        wanted = access_pb2.GrantRoleRequest(principal="robot", role=access_pb2.ROLE_DEPLOYER, models="dig*")
        role = await access.GrantRole(wanted, **headers(root.text))
        header = make_header("digits", ARCHIVE, create_model=True)
        look = registry_pb2.GetUploadRequest(model="digits", upload_id=header.upload_id)
        gate, is_over = site.application._gate, asyncio.Event()
        await gate.look()

        async def pieces() -> AsyncIterator[Any]:
            for piece in stream(ARCHIVE, header):
                yield piece
            await is_over.wait()

        call = site.admin.ModelRegistry.UploadVersion(pieces(), **headers(made.secret))
        async with asyncio.timeout(TIMEOUT_S):
            received = 0
            while received < len(ARCHIVE):
                await asyncio.sleep(0.02)
                with contextlib.suppress(grpc.aio.AioRpcError):  # it has not begun
                    received = (await site.admin.ModelRegistry.GetUpload(look, **headers(root.text))).received_bytes
        if taken == "role":
            await access.RevokeRole(access_pb2.RevokeRoleRequest(id=role.id), **headers(root.text))
        else:
            await access.RevokeApiKey(access_pb2.RevokeApiKeyRequest(id=made.key.id), **headers(root.text))
        await gate.look()
        is_over.set()
        error, _ = await refused(call)
        assert error.code().name == ("NOT_FOUND" if taken == "role" else "UNAUTHENTICATED")
        models = await site.admin.ModelRegistry.ListModels(registry_pb2.ListModelsRequest(), **headers(root.text))
        assert not models.models
