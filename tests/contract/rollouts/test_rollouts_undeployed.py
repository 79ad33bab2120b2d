"""What is taken out of service leaves nothing behind that keeps it from coming back, whatever went on beside it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import grpc
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from patience import PATIENCE
from rollout_site import CONFIG, TIMEOUT_S, Fleet, PuppetBackend, requests, until

from aiorch_server.deployments import service
from aiorch_server.errors import AiorchError, ModelLoadError
from aiorch_server.registry.records import RolloutState
from aiorch_server.repository import UnionRepository

ENSEMBLE = CONFIG.decode().replace('backend: "puppet"', 'platform: "ensemble"').replace(
    "instance_group { count: 1 kind: KIND_CPU }",
    'ensemble_scheduling { step { model_name: "m" model_version: -1 '
    'input_map { key: "INPUT0" value: "INPUT0" } output_map { key: "OUTPUT0" value: "OUTPUT0" } } }',
)  # fmt: skip


def write_ensemble(fleet: Fleet) -> None:
    folder = fleet.folder / "one" / "models" / "e"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(ENSEMBLE)


async def test_what_somebody_wanted_to_load_while_it_was_drained_is_deployed_again(fleet: Fleet) -> None:
    server = await fleet.start(lifecycle={"control_mode": "explicit"})
    write_ensemble(fleet)
    PuppetBackend.goes_on.clear()
    await fleet.serve_first(add=1, hangs=True)
    async with requests(server, callers=0) as traffic:
        hanging = asyncio.create_task(traffic.ask())
        await until(lambda: any(each.pending for each in server.manager.servables()))
        await fleet.ask(service.undeploy, "m")
        await until(lambda: not server.manager.ready("m"))
        others = [asyncio.create_task(server.manager.load("e")) for _ in range(2)]
        await until(lambda: server.manager._models["m"].is_contended)
        PuppetBackend.goes_on.set()
        assert await hanging == ("1", 2.0)
        for other in others:
            with pytest.raises(AiorchError, match="'m'"):
                await other
    await until(lambda: not server.manager.index_model("m"))
    second = await fleet.wait((await fleet.deploy(await fleet.push(add=5))).id)
    assert second.state is RolloutState.SUCCEEDED, second.reason
    async with requests(server, callers=0) as traffic:
        assert await traffic.ask() == ("2", 6.0)


async def test_a_name_is_given_back_where_its_folder_cannot_be_looked_at(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await fleet.start(lifecycle={"control_mode": "explicit"})
    await fleet.serve_first(add=1)
    look = UnionRepository.look

    def refuse(repository: UnionRepository, name: str) -> None:
        raise ModelLoadError("the folder is away")

    monkeypatch.setattr(UnionRepository, "look", refuse)
    await fleet.ask(service.undeploy, "m")
    await until(lambda: server.manager.traffic("m") is None)
    monkeypatch.setattr(UnionRepository, "look", look)
    folder = Path(fleet.folder, "one", "models", "m")
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_bytes(CONFIG)
    (folder / "1" / "puppet.json").write_text('{"add": 7}')
    await server.manager.load("m")
    assert server.manager.versions("m") == [1]
    async with requests(server, callers=0) as traffic:
        assert await traffic.ask() == ("1", 8.0)


async def test_a_model_of_the_folder_is_unloaded_while_the_database_is_away(fleet: Fleet) -> None:
    """And loaded; one that is deployed is refused as ever. None of it asks the database."""
    server = await fleet.start(lifecycle={"control_mode": "explicit"})
    await fleet.serve_first(add=1)
    folder = fleet.folder / "one" / "models" / "own"
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_bytes(CONFIG)
    (folder / "1" / "puppet.json").write_text('{"add": 7}')
    file = server.deployments.database.url.file  # type: ignore[union-attr]
    assert file is not None
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        calls = {
            verb: channel.unary_unary(
                f"/inference.GRPCInferenceService/RepositoryModel{verb}",
                request_serializer=getattr(pb, f"RepositoryModel{verb}Request").SerializeToString,
            )
            for verb in ("Load", "Unload")
        }
        load, unload = pb.RepositoryModelLoadRequest, pb.RepositoryModelUnloadRequest
        await calls["Load"](load(model_name="own"), timeout=TIMEOUT_S)
        with contextlib.closing(sqlite3.connect(file)) as other:
            other.execute("BEGIN EXCLUSIVE")  # nobody else gets on
            async with asyncio.timeout(5.0 * PATIENCE):
                await calls["Unload"](unload(model_name="own"))
                assert not server.manager.ready("own")
                await calls["Load"](load(model_name="own"))
                assert server.manager.versions("own") == [1]
                with pytest.raises(grpc.aio.AioRpcError, match="deployed from the registry: it is changed by its dep"):
                    await calls["Unload"](unload(model_name="m"))
                with pytest.raises(grpc.aio.AioRpcError, match="neither loaded nor in the model repository"):
                    await calls["Unload"](unload(model_name="nobody"))
            other.rollback()
