"""Servers of one registry in this process, versions of a model that do as they are told, and requests under way."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import grpc
import numpy as np
from patience import PATIENCE

from aiorch_server._core import decode_response, encode_request
from aiorch_server.app import Application
from aiorch_server.backend import Backend, LoadContext, ModelInstance
from aiorch_server.config.server import ServerConfig
from aiorch_server.deployments import service
from aiorch_server.deployments.rollout import Command
from aiorch_server.errors import ModelExecutionError, ModelLoadError
from aiorch_server.registry import rollouts
from aiorch_server.registry.database import Database
from aiorch_server.registry.events import read_events
from aiorch_server.registry.manifests import make_manifest
from aiorch_server.registry.records import ArtefactFile, Event, Provenance, Rollout, RolloutPlan, RolloutState
from aiorch_server.registry.store import open_store
from aiorch_server.registry.versions import add_version
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec

TIMEOUT_S = 30.0 * PATIENCE
INFER = "/inference.GRPCInferenceService/ModelInfer"
SIGNATURE = ModelSignature(
    (TensorSpec("INPUT0", DataType.FP32, (-1,)),), (TensorSpec("OUTPUT0", DataType.FP32, (-1,)),), max_batch_size=8
)


class PuppetBackend(Backend):
    """Models whose artefact says how they behave: ``{"add": 1, "delay_ms": 5, "fail": true, "hangs": true, ...}``."""

    name = "puppet"
    artefacts = ("puppet.json",)
    runs_code = False
    #: How often each (model, version) was loaded, and rows it has answered, in this process.
    loads: ClassVar[Counter[tuple[str, int]]] = Counter()
    rows: ClassVar[Counter[tuple[str, int]]] = Counter()
    #: Set by tests: a hook for each load.
    on_load: ClassVar[Callable[[LoadContext], None] | None] = None
    #: Set by tests: what hangs waits for it.
    goes_on: ClassVar[threading.Event] = threading.Event()

    def inspect(self, context: LoadContext) -> ModelSignature:
        return SIGNATURE

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        manners = json.loads(Path(context.artefact).read_text())
        key = (context.model_name, context.model_version)
        PuppetBackend.loads[key] += 1
        if PuppetBackend.on_load is not None:
            PuppetBackend.on_load(context)
        if manners.get("refuses"):
            raise ModelLoadError(manners["refuses"])
        return PuppetInstance(key, manners)


class PuppetInstance(ModelInstance):
    def __init__(self, key: tuple[str, int], manners: Mapping[str, Any]) -> None:
        self._key, self._manners = key, manners
        self._rows = 0

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        values = np.asarray(inputs["INPUT0"], np.float32)
        is_real = bool(values.any())  # a warm-up with zeros is none
        if is_real:
            self._rows += len(values)
            PuppetBackend.rows[self._key] += len(values)
        if delay_ms := self._manners.get("delay_ms"):
            time.sleep(delay_ms / 1e3)
        if is_real and self._manners.get("hangs"):
            PuppetBackend.goes_on.wait(TIMEOUT_S)
        if is_real and self._manners.get("fail"):
            raise ModelExecutionError("the puppet said no")
        if is_real and self._rows > self._manners.get("dies_after", 1e18):
            raise SystemExit("the puppet left")
        return {"OUTPUT0": values + np.float32(self._manners.get("add", 0))}


CONFIG = b"""
    backend: "puppet" max_batch_size: 8
    input { name: "INPUT0" data_type: TYPE_FP32 dims: [-1] }
    output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [-1] }
    instance_group { count: 1 kind: KIND_CPU }
"""


class Fleet:
    """A registry, and the servers that follow it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.database = Database(url)
        self.store = open_store(str(folder / "store"))
        self.servers: list[Application] = []

    def config(self, name: str, **sections: Any) -> ServerConfig:
        (self.folder / name / "models").mkdir(parents=True, exist_ok=True)
        given = {
            "grpc": {"host": "127.0.0.1", "port": 0, "io_threads": 1},
            "http": {"enabled": False},
            "metrics": {"enabled": False},
            "repository": {"paths": [str(self.folder / name / "models")]},
            "execution": {"backends": ["rollout_site:PuppetBackend", "aiorch_backends.python:PythonBackend"]},
            "registry": {
                "url": self.url,
                "artefacts": str(self.folder / "store"),
                "cache_folder": str(self.folder / name / "cache"),
            },
        }
        return ServerConfig.model_validate({**given, **sections})

    async def start(self, name: str = "one", **sections: Any) -> Application:
        application = Application(self.config(name, **sections))
        await asyncio.wait_for(application.start(), TIMEOUT_S)
        self.servers.append(application)
        return application

    async def stop(self, application: Application) -> None:
        self.servers.remove(application)
        await asyncio.wait_for(application.stop(5.0), TIMEOUT_S)

    async def close(self) -> None:
        for application in list(self.servers):
            await self.stop(application)
        await self.database.aclose()
        self.store.close()

    async def push(self, model: str = "m", *, files: Mapping[str, bytes] | None = None, **manners: Any) -> int:
        """A new version; gives its number."""
        contents = files or {"config.pbtxt": CONFIG, "puppet.json": json.dumps(manners).encode()}
        described = []
        with self.store.workspace() as folder:
            for path, content in contents.items():
                sha256 = hashlib.sha256(content).hexdigest()
                (folder / sha256).write_bytes(content)
                self.store.put(sha256, folder / sha256)
                described.append(ArtefactFile(path, len(content), sha256))
        manifest = make_manifest(described)
        has_code = "model.py" in contents
        version = await self.database.run(
            lambda session: add_version(
                session, model, manifest, Provenance(), actor="ada", has_code=has_code, create_model=True
            )
        )
        return version.version

    def nudge(self) -> None:
        for application in self.servers:
            if application.deployments is not None:
                application.deployments.nudge()

    async def ask(self, operation: Callable[..., service.Outcome], *arguments: Any, **options: Any) -> service.Outcome:
        """An operation of the service, by ada."""
        options.setdefault("actor", "ada")
        outcome = await self.database.run(lambda session: operation(session, *arguments, **options))
        self.nudge()
        return outcome

    async def deploy(self, version: int, plan: RolloutPlan | None = None, model: str = "m", **options: Any) -> Rollout:
        outcome = await self.ask(service.deploy, model, version=version, plan=plan, **options)
        assert outcome.rollout is not None
        return outcome.rollout

    async def direct(self, verb: Command, reason: str = "") -> service.Outcome:
        return await self.ask(service.direct, "m", verb, reason=reason)

    async def read(self, id: str) -> Rollout:
        return await self.database.read(lambda session: rollouts.get_rollout(session, id))

    async def wait(self, id: str, *states: RolloutState) -> Rollout:
        """The rollout once it is in one of these states (none: has ended)."""

        async def look() -> Rollout | None:
            found = await self.read(id)
            if found.state in states or found.state.is_end:
                assert not states or found.state in states, f"{found.state}: {found.reason}"
                return found
            return None

        return await poll(look, lambda: self.read(id))

    async def serve_first(self, **manners: Any) -> int:
        """A first version, deployed."""
        version = await self.push(**manners)
        found = await self.wait((await self.deploy(version)).id)
        assert found.state is RolloutState.SUCCEEDED, found.reason
        return version

    async def events(self) -> tuple[Event, ...]:
        return await self.database.read(read_events)


async def poll(look: Callable[[], Any], explain: Callable[[], Any] | None = None) -> Any:
    """What ``look`` gives as soon as it gives something true."""
    until = time.monotonic() + TIMEOUT_S
    while not (found := await look()):
        if time.monotonic() > until:
            raise AssertionError(f"it did not come to that: {await explain() if explain else ''}")
        await asyncio.sleep(0.02)
    return found


async def until(is_so: Callable[[], bool]) -> None:
    async def look() -> bool:
        return is_so()

    await poll(look)


class Traffic:
    """Requests without a version, one after another from each of a few callers, until ``stop``; counted by version."""

    def __init__(self, application: Application, *, model: str = "m", callers: int = 4, pause_s: float = 0.0) -> None:
        self.target = f"127.0.0.1:{application.grpc_port}"
        self.model, self.pause_s = model, pause_s
        self.answers: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._channel = grpc.aio.insecure_channel(self.target)
        self._call = self._channel.unary_unary(INFER)
        self._is_over = False
        self._tasks = [asyncio.create_task(self._run()) for _ in range(callers)]

    async def ask(self, value: float = 1.0, key: str = "", timeout_s: float = TIMEOUT_S) -> tuple[str, float]:
        """The version that answered, and what."""
        data = struct.pack("<2f", value, value)
        message = encode_request(self.model, "", "", [("INPUT0", "FP32", (1, 2), data)])
        metadata = (("aiorch-route-key", key),) if key else ()
        answer = await self._call(message, metadata=metadata, timeout=timeout_s)
        _, version, _, ((_, _, _, data),) = decode_response(answer)
        return version, struct.unpack("<2f", data)[0]

    async def _run(self) -> None:
        while not self._is_over:
            try:
                version, _ = await self.ask()
                self.answers[version] += 1
            except grpc.aio.AioRpcError as error:
                self.errors[f"{error.code().name}: {error.details()}"] += 1
            if self.pause_s:
                await asyncio.sleep(self.pause_s)

    async def wait_for(self, version: int, count: int = 1) -> None:
        """Until so many more answers came from that version."""
        wanted = self.answers[str(version)] + count
        await until(lambda: self.answers[str(version)] >= wanted)

    async def stop(self) -> None:
        self._is_over = True
        await asyncio.wait_for(asyncio.gather(*self._tasks), TIMEOUT_S)
        await self._channel.close()


@contextlib.asynccontextmanager
async def requests(application: Application, **options: Any) -> AsyncIterator[Traffic]:
    traffic = Traffic(application, **options)
    try:
        yield traffic
    finally:
        await traffic.stop()
