"""Deployed versions in the lifecycle: each by its own configuration, from verified files, beside models in folders."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from registry_uploads import push

from aiorch_server._core import Mailbox, Router
from aiorch_server.backend import Backend, LoadContext, ModelInstance
from aiorch_server.dataplane import DataPlane
from aiorch_server.errors import BackendError, ModelLoadError, OverrideRefused, RequestError, UnknownModel
from aiorch_server.lifecycle.backends import BackendRegistry
from aiorch_server.lifecycle.loader import Loader
from aiorch_server.lifecycle.manager import LifecycleManager
from aiorch_server.registry.checkout import Checkout
from aiorch_server.registry.store import ArtefactStore, open_store
from aiorch_server.repository import (
    FilesystemRepository,
    RegisteredModel,
    RegisteredRepository,
    RegisteredVersion,
    UnionRepository,
)
from aiorch_server.types import (
    DataType,
    InferenceRequest,
    ModelSignature,
    ModelState,
    NumpyArray,
    Tensor,
    TensorSpec,
)

DEADLINE_S = 15.0
ISOLATED = 'parameters { key: "isolate_failures" value { string_value: "true" } }'
OUTPUT = b'output { name: "Y" data_type: TYPE_INT32 dims: 1 '


class Multiplier(ModelInstance):
    """Multiplies by its artefact's factor, and says by how many rows it was called."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return {"Y": inputs["X"] * self.factor}


class MultiplierBackend(Backend):
    name = "multiplier"
    artefacts = ("model.json",)
    runs_code = False

    def __init__(self) -> None:
        self.loads: list[int] = []
        self.directories: list[Path] = []

    def inspect(self, context: LoadContext) -> ModelSignature:
        json.loads(context.artefact.read_text())
        spec = (DataType.INT32, (1,))
        size = context.declared.max_batch_size
        return ModelSignature(
            (TensorSpec("X", *spec),),
            (TensorSpec("Y", *spec),),
            context.default_max_batch_size if size is None else size,
        )

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        self.loads.append(context.model_version)
        self.directories.append(context.model_directory)
        return Multiplier(json.loads(context.artefact.read_text())["factor"])


class Site:
    """A store, a cache, and a manager over folders and what is deployed."""

    def __init__(self, tmp_path: Path, *, allow_code: bool = False, control_mode: str = "explicit") -> None:
        self.root = tmp_path / "models"
        self.root.mkdir()
        self.store: ArtefactStore = open_store(str(tmp_path / "store"))
        self.checkout = Checkout(self.store, tmp_path / "cache")
        self.backend = MultiplierBackend()
        backends = BackendRegistry()
        backends.add(self.backend)
        self.deployed = RegisteredRepository()
        self.repository = UnionRepository(FilesystemRepository([self.root]), self.deployed)
        loader = Loader(backends, allow_code=allow_code, identifies=True)
        self.manager = LifecycleManager(self.repository, loader, Router(), control_mode=control_mode)
        self.mailbox = Mailbox(asyncio.get_running_loop())
        self.dataplane = DataPlane(self.manager, self.mailbox)
        self.versions: dict[str, dict[int, RegisteredVersion]] = {}

    def upload(self, name: str, version: int, files: Mapping[str, bytes]) -> None:
        manifest = push(self.store, dict(files)).manifest
        self.versions.setdefault(name, {})[version] = RegisteredVersion(
            manifest.digest, partial(self.checkout.acquire, name, version, manifest)
        )

    def scale(self, name: str, *versions: int, factor: int | None = None, config: str = "") -> None:
        """Uploads what is not there yet: version ``n`` multiplies by ``n``."""
        for version in versions:
            if version not in self.versions.get(name, {}):
                files = {"model.json": json.dumps({"factor": factor or version}).encode()}
                self.upload(name, version, {**files, "config.pbtxt": config.encode()} if config else files)

    async def deploy(self, name: str, *versions: int, instances: int = 0) -> None:
        wanted = {version: self.versions[name][version] for version in versions}
        self.deployed.put(name, RegisteredModel(wanted, instances))
        await self.manager.load(name)

    async def infer(self, name: str, version: str = "", rows: int = 1) -> int:
        data = np.ones((rows, 1), np.int32).tobytes()
        request = InferenceRequest(name, version, [Tensor("X", "INT32", (rows, 1), data)])
        response = await asyncio.wait_for(self.dataplane.infer(request), DEADLINE_S)
        content = response.outputs[0].data
        assert content is not None
        return int(np.frombuffer(content, np.int32)[0])

    def states(self, name: str) -> dict[str, ModelState]:
        return {entry.version: entry.state for entry in self.manager.index() if entry.name == name}


@asynccontextmanager
async def running(tmp_path: Path, **options: object) -> AsyncIterator[Site]:
    site = Site(tmp_path, **options)  # type: ignore[arg-type]
    try:
        await asyncio.wait_for(site.manager.start(), DEADLINE_S)
        yield site
    finally:
        await asyncio.wait_for(site.manager.stop(DEADLINE_S), DEADLINE_S)
        site.mailbox.close()
        site.checkout.close()
        site.store.close()


async def test_versions_with_configurations_of_their_own(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        site.scale("m", 1, config="max_batch_size: 4 instance_group { count: 1 }")
        site.scale("m", 2, config=f"max_batch_size: 16 instance_group {{ count: 3 }} {ISOLATED}")
        await site.deploy("m", 1, 2)
        assert site.manager.versions("m") == [1, 2]
        one, two = (site.manager.find("m", version) for version in "12")
        assert (one.config.max_batch_size, two.config.max_batch_size) == (4, 16)
        assert (one.signature.max_batch_size, two.signature.max_batch_size) == (4, 16)
        assert [group.count for group in one.config.instance_group] == [1]
        assert [group.count for group in two.config.instance_group] == [3]
        assert sorted(site.backend.loads) == [1, 2, 2, 2]
        assert not one.config.parameters
        assert two.config.parameters
        assert await site.infer("m", "2", rows=16) == 2
        with pytest.raises(RequestError, match="4"):
            await site.infer("m", "1", rows=16)
        assert [await site.infer("m", version, rows=4) for version in ("1", "2", "")] == [1, 2, 2]


async def test_a_policy_that_is_written_counts_for_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        site.scale("m", 1, config="version_policy { latest { num_versions: 1 } }")
        site.scale("m", 3, config="version_policy { specific { versions: 9 } }")
        await site.deploy("m", 1, 3)
        assert site.manager.versions("m") == [1, 3]
        for version in "13":
            policy = site.manager.find("m", version).config.version_policy
            assert policy is not None
            assert policy.specific is not None
            assert policy.specific.versions == (1, 3)


async def test_versions_come_and_go_without_touching_the_others(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        site.scale("m", 1, 2)
        await site.deploy("m", 1)
        first = site.manager.find("m", "1")
        await site.deploy("m", 1, 2)
        assert site.manager.find("m", "1") is first
        await site.deploy("m", 2)
        assert site.states("m") == {"1": ModelState.UNAVAILABLE, "2": ModelState.READY}
        assert site.backend.loads == [1, 2]
        await site.deploy("m", 1)
        assert await site.infer("m") == 1
        site.deployed.remove("m")
        assert site.deployed.look("m") is None
        await site.manager.unload("m")
        assert site.manager.versions("m") == []
        with pytest.raises(BackendError, match="failed to poll from model repository"):
            await site.manager.load("m")


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"model.json": b"{", "config.pbtxt": b"max_batch_size: 4"}, "not JSON|JSONDecodeError"),
        ({"model.json": b'{"factor": 2}', "config.pbtxt": b"max_batch_size: -4"}, "max_batch_size"),
        ({"model.json": b'{"factor": 2}', "config.pbtxt": b'name: "other"'}, "name"),
        ({"model.json": b'{"factor": 2}', "config.yaml": b"no_such_field: 1"}, "no_such_field"),
        (
            {"model.json": b'{"factor": 2}', "config.pbtxt": b'backend: "none"'},
            "backend 'none'|no artefact",
        ),
        ({"model.bin": b"x"}, "no artefact"),
        ({"model.json": b'{"factor": 2}', "config.pbtxt": OUTPUT + b'label_filename: "none.txt" }'}, "none.txt"),
    ],
)
async def test_a_version_that_is_wrong_harms_itself_alone(tmp_path: Path, files: dict[str, bytes], word: str) -> None:
    async with running(tmp_path) as site:
        site.scale("m", 1)
        site.upload("m", 2, files)
        await site.deploy("m", 1)
        first = site.manager.find("m", "1")
        with pytest.raises(ModelLoadError, match=word):
            await site.deploy("m", 1, 2)
        assert site.manager.find("m") is first
        assert await site.infer("m") == 1
        assert site.states("m")["2"] is ModelState.UNAVAILABLE
        site.scale("m", 3)
        await site.deploy("m", 1, 3)
        assert await site.infer("m") == 3


async def test_labels_and_model_folders(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        config = OUTPUT + b'label_filename: "labels.txt" }'
        files = {"config.pbtxt": config, "labels.txt": b"cat\ndog"}
        site.upload("m", 1, {**files, "model.json": b'{"factor": 5}'})
        site.upload("m", 2, {**files, "labels.txt": b"cow", "9/model.json": b'{"factor": 7}'})
        await site.deploy("m", 1, 2)
        assert [await site.infer("m", version) for version in "12"] == [5, 7]
        labels = [site.manager.find("m", version).signature.outputs[0].labels for version in "12"]
        assert labels == [("cat", "dog"), ("cow",)]
        assert {directory.name for directory in site.backend.directories} == {"m"}


async def test_scaling(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        site.scale("m", 1)
        site.scale("m", 2, config="instance_group { count: 1 kind: KIND_CPU }")
        site.scale("m", 3, config="instance_group { count: 1 } instance_group { count: 1 }")
        await site.deploy("m", 1, 2)
        former = site.manager.find("m", "1")
        await site.deploy("m", 1, 2, instances=3)
        for version in "12":
            assert [group.count for group in site.manager.find("m", version).config.instance_group] == [3]
        assert site.manager.find("m", "1") is not former
        assert site.backend.loads == [2, 1, *[2] * 3, *[1] * 3]
        assert former.identity == site.manager.find("m", "1").identity
        with pytest.raises(ModelLoadError, match="2 instance groups"):
            await site.deploy("m", 3, instances=3)
        assert await site.infer("m") == 2


async def test_what_serves_goes_on_while_the_store_is_away(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        site.scale("m", 1, 2)
        await site.deploy("m", 1)
        blobs, away = tmp_path / "store" / "blobs", tmp_path / "store" / "away"
        blobs.rename(away)
        blobs.write_text("not mounted")
        with pytest.raises(ModelLoadError, match=r"version 2: the artefact store does not answer"):
            await site.deploy("m", 1, 2)
        assert await site.infer("m") == 1
        blobs.unlink()
        away.rename(blobs)
        await site.deploy("m", 1, 2)
        assert await site.infer("m") == 2


async def test_files_that_were_changed(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        site.scale("m", 1, 2)
        await site.deploy("m", 1)
        for blob in (tmp_path / "store" / "blobs").rglob("*"):
            if blob.is_file() and blob.read_bytes() == b'{"factor": 2}':
                blob.chmod(0o600)
                blob.write_bytes(b'{"factor": 9}')
        with pytest.raises(ModelLoadError, match=r"'model.json' of version 2 of model 'm' is not what was uploaded"):
            await site.deploy("m", 1, 2)
        assert await site.infer("m") == 1
        await site.manager.unload("m")
        (site.backend.directories[0] / "1" / "model.json").unlink()
        with pytest.raises(ModelLoadError, match=r"'model.json' of version 1 of model 'm' is not what was uploaded"):
            await site.deploy("m", 1)
        await site.deploy("m", 1)
        assert await site.infer("m") == 1


async def test_files_are_held_while_a_version_serves(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        site.scale("m", 1, 2)
        site.checkout._most_bytes = 0
        await site.deploy("m", 1)
        directory = site.backend.directories[0]
        await site.deploy("m", 1, 2)
        assert directory.exists()
        await site.deploy("m", 2)
        site.scale("m", 3)
        await site.deploy("m", 2, 3)
        assert not directory.exists()


async def test_code_needs_consent(tmp_path: Path) -> None:
    code = {"model.py": b"class Model:\n    def execute(self, inputs):\n        return {'Y': inputs['X'] * 4}\n"}
    config = b'max_batch_size: 4 input { name: "X" data_type: TYPE_INT32 dims: 1 }' + OUTPUT + b"}"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with running(tmp_path / "a") as site:
        site.upload("m", 1, {**code, "config.pbtxt": config})
        with pytest.raises(ModelLoadError, match=r"the uploaded version brings .* --allow-code .* upload versions"):
            await site.deploy("m", 1)
    async with running(tmp_path / "b", allow_code=True) as site:
        site.upload("m", 1, {**code, "config.pbtxt": config})
        await site.deploy("m", 1)
        assert await site.infer("m") == 4


def ensemble(step: str) -> bytes:
    return (
        'platform: "ensemble" max_batch_size: 4 '
        'input { name: "X" data_type: TYPE_INT32 dims: 1 } output { name: "Y" data_type: TYPE_INT32 dims: 1 } '
        f'ensemble_scheduling {{ step {{ model_name: "{step}" input_map {{ key: "X" value: "X" }} '
        'output_map { key: "Y" value: "Y" } } }'
    ).encode()


async def test_ensembles_whose_versions_need_other_models(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        site.scale("a", 1, factor=10, config="max_batch_size: 4")
        site.scale("b", 1, factor=20, config="max_batch_size: 4")
        site.upload("e", 1, {"config.pbtxt": ensemble("a")})
        site.upload("e", 2, {"config.pbtxt": ensemble("b")})
        await site.deploy("a", 1)
        await site.deploy("e", 1)
        assert await site.infer("e") == 10
        with pytest.raises(ModelLoadError, match="'b' which has no loaded version"):
            await site.deploy("e", 1, 2)
        assert await site.infer("e") == 10
        await site.deploy("b", 1)
        async with asyncio.timeout(DEADLINE_S):
            while site.manager.versions("e") != [1, 2]:  # it was waiting for b
                await asyncio.sleep(0.002)
        assert [await site.infer("e", version) for version in "12"] == [10, 20]
        await site.manager.unload("a")
        assert site.manager.versions("e") == [2]


async def test_a_load_request_cannot_change_what_is_deployed(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        site.scale("m", 1)
        await site.deploy("m", 1)
        with pytest.raises(OverrideRefused, match="deployed from the registry"):
            await site.manager.load("m", '{"max_batch_size": 1}')
        with pytest.raises(OverrideRefused, match="deployed from the registry"):
            await site.manager.load("m", "{}", {"file:1/model.json": b'{"factor": 9}'})
        assert await site.infer("m") == 1
        await site.manager.load("m")
        assert site.backend.loads == [1]


def write(root: Path, name: str, factor: int) -> None:
    (root / name / "1").mkdir(parents=True)
    (root / name / "1" / "model.json").write_text(json.dumps({"factor": factor}))


async def test_a_name_in_both_is_a_problem_of_that_model_alone(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        write(site.root, "both", 3)
        write(site.root, "stored", 5)
        site.scale("both", 1)
        site.scale("deployed", 1, factor=7)
        await site.deploy("deployed", 1)
        await site.manager.load("stored")
        with pytest.raises(ModelLoadError, match="'both' is both in the model repository's folder and deployed"):
            await site.deploy("both", 1)
        assert "both in the model" in site.repository.scan()["both"].problem
        assert list(site.repository.scan()) == ["both", "deployed", "stored"]
        assert [await site.infer(name) for name in ("stored", "deployed")] == [5, 7]
        write(site.root, "deployed", 9)
        with pytest.raises(ModelLoadError, match="remove its folder, or undeploy it"):
            await site.manager.load("deployed")
        assert await site.infer("deployed") == 7
        site.deployed.remove("both")
        await site.manager.load("both")
        assert await site.infer("both") == 3


async def test_folders_that_cannot_be_read_do_not_stop_what_is_deployed(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        site.scale("m", 1)
        site.root.rmdir()
        await site.deploy("m", 1)
        assert await site.infer("m") == 1
        with pytest.raises(ModelLoadError, match="repository cannot be read"):
            site.repository.scan()


async def test_polling_follows_what_is_deployed(tmp_path: Path) -> None:
    async with running(tmp_path, control_mode="poll") as site:
        site.scale("m", 1, 2)
        site.deployed.put("m", RegisteredModel({1: site.versions["m"][1]}))
        await site.manager.poll()
        assert await site.infer("m") == 1
        site.deployed.put("m", RegisteredModel({2: site.versions["m"][2]}))
        await site.manager.poll()
        await site.manager.poll()
        assert await site.infer("m") == 2
        assert site.backend.loads == [1, 2]
        site.deployed.put("m", RegisteredModel({}))
        await site.manager.poll()
        assert site.manager.versions("m") == []


async def test_a_slow_store_does_not_hold_up_the_event_loop_and_a_cancelled_wait_leaks_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as site:
        site.scale("m", 1)
        version = site.versions["m"][1]
        gate, entered, released = threading.Event(), threading.Event(), threading.Event()

        class Watched:
            def __init__(self) -> None:
                self.tree = version.check_out()
                self.directory = self.tree.directory

            def release(self) -> None:
                self.tree.release()
                released.set()

        def check_out() -> Watched:
            entered.set()
            assert gate.wait(DEADLINE_S)
            return Watched()

        site.versions["m"][1] = RegisteredVersion(version.digest, check_out)
        deploying = asyncio.ensure_future(site.deploy("m", 1))
        assert await asyncio.to_thread(entered.wait, DEADLINE_S)
        deploying.cancel()
        stopping = asyncio.ensure_future(site.manager.stop(DEADLINE_S))
        await asyncio.wait_for(stopping, DEADLINE_S)
        assert not released.is_set()
        gate.set()
        assert await asyncio.to_thread(released.wait, DEADLINE_S)


def test_what_is_not_deployed() -> None:
    repository = RegisteredRepository()
    assert repository.scan() == {}
    assert repository.look("m") is None
    with pytest.raises(UnknownModel, match="not deployed"):
        repository.open("m")
