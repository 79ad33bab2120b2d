"""Real servers over small planes that answer from memory, and real clients on them."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from aiorch_proto.v2.service import InferenceStub
from counting_model import CONFIG, CountingBackend

from aiorch_server import errors, types
from aiorch_server._core import Mailbox, Router
from aiorch_server.config.server import LifecycleConfig
from aiorch_server.controlplane import ControlPlane
from aiorch_server.dataplane import DataPlane
from aiorch_server.exchange import SharedRegions
from aiorch_server.frontends.grpc import GrpcDoor, create_grpcio_server, is_native_available
from aiorch_server.frontends.grpc.health import add_health_service
from aiorch_server.frontends.grpc.reflection import add_reflection_service
from aiorch_server.frontends.grpc.servicer import InferenceServicer, add_inference_service
from aiorch_server.lifecycle.backends import BackendRegistry
from aiorch_server.lifecycle.loader import Loader
from aiorch_server.lifecycle.manager import LifecycleManager
from aiorch_server.repository import FilesystemRepository

DEADLINE_S = 20.0


class MemoryDataPlane:
    """Models by name: echo, slow (waits for ``release``), broken, broken_beside, buggy, dropped and expired."""

    def __init__(self) -> None:
        self.requests: list[types.InferenceRequest] = []
        self.deadlines_ns: list[int] = []
        self.release = asyncio.Event()
        self.running = 0
        self.most_running = 0
        self.cancelled = 0
        self.changed = asyncio.Condition()
        self.notices: set[asyncio.Future[None]] = set()

    async def infer(self, request: types.InferenceRequest, *, deadline_ns: int = 0) -> types.InferenceResponse:
        self.requests.append(request)
        self.deadlines_ns.append(deadline_ns)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.notify()
            await self._run(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            # beside, because a cancelled request may not wait any more
            self.notices.add(notice := asyncio.ensure_future(self.notify()))
            notice.add_done_callback(self.notices.discard)
        return types.InferenceResponse(
            request.model_name,
            request.model_version or "7",
            [types.Tensor(f"OUT_{t.name}", t.datatype, t.shape, memoryview(t.data or b"")) for t in request.inputs],
            request.id,
            {"echoed": True},
        )

    def is_decoupled(self, model_name: str, model_version: str) -> bool:
        return False

    async def stream(
        self, request: types.InferenceRequest, *, deadline_ns: int = 0
    ) -> AsyncIterator[types.InferenceResponse]:
        answer = await self.infer(request, deadline_ns=deadline_ns)
        yield dataclasses.replace(answer, parameters={**answer.parameters, types.FINAL_RESPONSE: True})

    async def _run(self, request: types.InferenceRequest) -> None:
        match request.model_name:
            case "echo":
                return
            case "slow":
                await self.release.wait()
            case "backwards":  # the first to come is the last to be done
                await asyncio.sleep(0.2 / (1 + int(request.id)))
            case "broken":
                raise errors.ModelExecutionError(f"[request id: {request.id}] the model said no")
            case "broken_beside":  # once a slow neighbour is there too
                await self.wait_until(lambda: any(each.model_name == "slow" for each in self.requests))
                raise errors.ModelExecutionError(f"[request id: {request.id}] the model said no")
            case "buggy":
                raise ZeroDivisionError("secret of the house")
            case "dropped":
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                future.cancel()
                await future
            case name:
                raise errors.UnknownModel(f"Request for unknown model: '{name}' is not found")

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def wait_until(self, is_true: Any) -> None:
        async with asyncio.timeout(DEADLINE_S):
            async with self.changed:
                await self.changed.wait_for(is_true)

    async def wait_cancelled(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while self.cancelled < count or self.running:
                await asyncio.sleep(0.005)


class MemoryControlPlane:
    def __init__(self) -> None:
        self.live = True
        self.ready = True
        self.loads: list[tuple[str, str | None, Mapping[str, bytes]]] = []
        self.unloads: list[tuple[str, bool]] = []
        self.regions = SharedRegions()

    def server_metadata(self) -> types.ServerMetadata:
        return types.ServerMetadata("aiorchestrator", "0.1.0", ("statistics", "model_repository"))

    def check_running(self, text: str) -> None:
        if not self.live:
            raise errors.ServerStopping(text)

    def is_live(self) -> bool:
        if not self.live:
            raise errors.ServerStopping("Server exiting")
        return True

    def is_ready(self) -> bool:
        return self.ready

    def model_ready(self, name: str, version: str) -> bool:
        return (name, version) in {("echo", ""), ("echo", "7")}

    def _check(self, name: str, version: str) -> None:
        if name != "echo":
            raise errors.UnknownModel(f"Request for unknown model: '{name}' is not found")
        if version not in ("", "7"):
            raise errors.UnknownVersion(f"Request for unknown model: '{name}' version {version} is not found")

    async def bring(self, name: str, version: str = "", *, deadline_ns: int = 0) -> None:
        pass

    def model_metadata(self, name: str, version: str) -> types.ModelMetadata:
        self._check(name, version)
        return types.ModelMetadata(
            name,
            ("7",),
            "identity",
            (types.TensorMetadata("A", "FP32", (-1, 4)),),
            (types.TensorMetadata("OUT_A", "FP32", (-1, 4)),),
        )

    def model_config(self, name: str, version: str) -> Any:
        self._check(name, version)
        config = {
            "name": name,
            "backend": "identity",
            "max_batch_size": 8,
            "input": [{"name": "A", "data_type": "TYPE_FP32", "dims": ["4"]}],
            "output": [{"name": "OUT_A", "data_type": "TYPE_FP32", "dims": [4]}],
            "instance_group": [{"count": 2, "kind": "KIND_CPU"}],
            "dynamic_batching": {"max_queue_delay_microseconds": 100, "preferred_batch_size": [4]},
            "parameters": {"version_label.blue": {"string_value": "3"}},
        }
        return SimpleNamespace(to_dict=lambda: config)

    def statistics(self, name: str = "", version: str = "") -> list[types.ModelStatistics]:
        if name not in ("", "echo"):
            raise errors.RequestError(f"requested model '{name}' is not available")
        duration = types.Duration
        return [
            types.ModelStatistics(
                "echo",
                "7",
                last_inference_ms=1_700_000_000_123,
                inference_count=6,
                execution_count=2,
                success=duration(3, 300),
                fail=duration(1, 10),
                queue=duration(3, 30),
                compute_input=duration(3, 31),
                compute_infer=duration(3, 32),
                compute_output=duration(3, 33),
                batches=(types.BatchStatistics(3, duration(2, 1), duration(2, 2), duration(2, 3)),),
            )
        ]

    def repository_index(self, ready_only: bool) -> list[types.ModelIndexEntry]:
        entries = [
            types.ModelIndexEntry("echo", "7", types.ModelState.READY),
            types.ModelIndexEntry("gone", "", types.ModelState.UNAVAILABLE, "unloaded"),
        ]
        return entries[:1] if ready_only else entries

    async def load_model(self, name: str, config_json: str | None = None, files: Mapping[str, bytes] = {}) -> None:
        if name == "bad":
            raise errors.ModelLoadError(
                "failed to load 'bad', failed to poll from model repository\n" + "long reason é " * 1000
            )
        if config_json is not None:
            json.loads(config_json)
        self.loads.append((name, config_json, files))

    async def unload_model(self, name: str, unload_dependents: bool = False) -> None:
        self.unloads.append((name, unload_dependents))


#: The servers on which every test of this folder runs.
NEEDS_NATIVE = pytest.mark.skipif(not is_native_available(), reason="built without libnghttp2: no native door")
DOORS = ["grpcio", *[pytest.param(f"native-{threads}", marks=NEEDS_NATIVE) for threads in (0, 1)]]


@asynccontextmanager
async def serve(
    door: str, dataplane: Any, controlplane: Any, router: Router | None = None
) -> AsyncIterator[SimpleNamespace]:
    """A running server: ``url``, ``dataplane``, ``controlplane``, ``health``, ``stub`` and ``channel`` (grpc.aio)."""
    if door == "grpcio":
        server = create_grpcio_server()
    else:
        server = GrpcDoor(router=router, io_threads=int(door.removeprefix("native-")))
    add_inference_service(InferenceServicer(dataplane, controlplane), server)
    health = await add_health_service(server)
    add_reflection_service(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        url = f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(url) as channel:
            yield SimpleNamespace(
                url=url,
                dataplane=dataplane,
                controlplane=controlplane,
                health=health,
                channel=channel,
                stub=InferenceStub(channel),
            )
    finally:
        await server.stop(None)


@pytest.fixture(params=DOORS)
async def site(request: pytest.FixtureRequest) -> AsyncIterator[SimpleNamespace]:
    """A server over planes in memory."""
    async with serve(request.param, MemoryDataPlane(), MemoryControlPlane()) as site:
        yield site


MODELS = {
    "identity": """
        backend: "identity" max_batch_size: 8
        input [{ name: "A" data_type: TYPE_FP32 dims: [4] }, { name: "B" data_type: TYPE_INT64 dims: [-1] }]
        output [{ name: "X" data_type: TYPE_FP32 dims: [4] }, { name: "Y" data_type: TYPE_INT64 dims: [-1] }]
        dynamic_batching { max_queue_delay_microseconds: 100 }
    """,
    "all_types": 'backend: "identity" max_batch_size: 4 '
    + " ".join(
        f"""input {{ name: "{t.value}" data_type: {t.config_name} dims: [-1] }}
            output {{ name: "OUT_{t.value}" data_type: {t.config_name} dims: [-1] }}"""
        for t in types.DataType
    ),
    "text": """
        backend: "identity" max_batch_size: 0
        input { name: "A" data_type: TYPE_STRING dims: [-1] } output { name: "X" data_type: TYPE_STRING dims: [-1] }
    """,
    "slow": """
        backend: "identity" max_batch_size: 1
        input { name: "A" data_type: TYPE_FP32 dims: [1] } output { name: "X" data_type: TYPE_FP32 dims: [1] }
        parameters { key: "execute_delay_us" value { string_value: "300000" } }
    """,
}


@pytest.fixture(params=DOORS)
async def real_site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SimpleNamespace]:
    """A server over the real planes with the models of MODELS, version 3, in control mode explicit."""
    for name, config in MODELS.items():
        (tmp_path / name / "3").mkdir(parents=True)
        (tmp_path / name / "config.pbtxt").write_text(config)
    backends = BackendRegistry(["aiorch_backends.identity:IdentityBackend"])
    router, mailbox = Router(), Mailbox(asyncio.get_running_loop())
    manager = LifecycleManager(
        FilesystemRepository([tmp_path]), Loader(backends), router, control_mode="explicit", load_models=("*",)
    )
    await manager.start()
    try:
        controlplane = ControlPlane(manager, LifecycleConfig(control_mode="explicit"))
        async with serve(request.param, DataPlane(manager, mailbox), controlplane, router) as site:
            site.manager = manager
            yield site
    finally:
        await manager.stop(5.0)
        mailbox.close()


PLAIN = """
    backend: "identity" max_batch_size: 8
    input { name: "N" data_type: TYPE_INT32 dims: [1] } output { name: "I" data_type: TYPE_INT32 dims: [1] }
"""


@pytest.fixture(params=DOORS)
async def decoupled_site(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SimpleNamespace]:
    """A server over the real planes with a decoupled model ``count`` and an ordinary one, ``plain``."""
    for name, config in {"count": CONFIG, "plain": PLAIN}.items():
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "1" / "counting.txt").touch()
        (tmp_path / name / "config.pbtxt").write_text(config)
    backends = BackendRegistry(["aiorch_backends.identity:IdentityBackend"])
    backends.add(backend := CountingBackend())
    router, mailbox = Router(), Mailbox(asyncio.get_running_loop())
    manager = LifecycleManager(
        FilesystemRepository([tmp_path]),
        Loader(backends),
        router,
        control_mode="explicit",
        load_models=("*",),
        drain_timeout_s=0.2,
    )
    await manager.start()
    try:
        controlplane = ControlPlane(manager, LifecycleConfig(control_mode="explicit"))
        async with serve(request.param, DataPlane(manager, mailbox), controlplane, router) as site:
            site.backend = backend
            site.manager = manager
            yield site
    finally:
        backend.close()
        await manager.stop(5.0)
        mailbox.close()
        assert len(asyncio.all_tasks()) == 1
