"""A REST door over planes whose every move a test decides."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

import httpx
import pytest

from aiorch_server.errors import RequestError, UnknownModel, UnknownVersion
from aiorch_server.exchange import SharedRegions
from aiorch_server.frontends.rest import RestServer
from aiorch_server.frontends.rest.planes import RestLimits
from aiorch_server.types import (
    BatchStatistics,
    Duration,
    InferenceRequest,
    InferenceResponse,
    ModelIndexEntry,
    ModelMetadata,
    ModelSignature,
    ModelState,
    ModelStatistics,
    ServerMetadata,
    Tensor,
    TensorMetadata,
)

MODEL = "echo"


class EchoPlane:
    """Gives each input back as an output of the same name, unless a test wants something else."""

    def __init__(self) -> None:
        self.requests: list[InferenceRequest] = []
        self.gate: asyncio.Event | None = None  # requests wait here when set
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.failure: BaseException | None = None
        self.outputs: Sequence[Tensor] | None = None

    async def infer(self, request: InferenceRequest, *, deadline_ns: int = 0) -> InferenceResponse:
        if request.model_name != MODEL:
            raise UnknownModel(f"Request for unknown model: '{request.model_name}' is not found")
        if request.model_version not in ("", "1"):
            raise UnknownVersion(f"Request for unknown model: '{MODEL}' version {request.model_version} is not found")
        self.requests.append(request)
        self.entered.set()
        try:
            if self.gate is not None:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.failure is not None:
            raise self.failure
        outputs = self.outputs
        if outputs is None:
            wanted = [output.name for output in request.outputs] or [tensor.name for tensor in request.inputs]
            tensors = {tensor.name: tensor for tensor in request.inputs}
            for name in wanted:
                if name not in tensors:
                    raise RequestError(f"unexpected inference output '{name}' for model '{MODEL}'")
            outputs = [Tensor(n, tensors[n].datatype, tensors[n].shape, tensors[n].data) for n in wanted]
        return InferenceResponse(request.model_name, request.model_version or "1", outputs, request.id)


class ModelConfigDocument:
    def to_dict(self) -> Mapping[str, object]:
        return {"name": MODEL, "platform": "", "max_batch_size": 8, "input": [{"name": "IN", "data_type": "TYPE_FP32"}]}


class RecordingControl:
    """One ready model, one failed, one that was never loaded; remembers what it was told."""

    def __init__(self) -> None:
        self.is_server_live = True
        self.is_server_ready = True
        self.calls: list[tuple[object, ...]] = []
        self.failure: Exception | None = None
        self.regions = SharedRegions()

    def server_metadata(self) -> ServerMetadata:
        return ServerMetadata("aiorchestrator", "0.1.0", ("statistics", "binary_tensor_data"))

    def is_live(self) -> bool:
        return self.is_server_live

    def is_ready(self) -> bool:
        if self.failure is not None:
            raise self.failure
        return self.is_server_ready

    def _check(self, name: str, version: str) -> None:
        if name != MODEL:
            raise UnknownModel(f"Request for unknown model: '{name}' is not found")
        if version not in ("", "1"):
            raise UnknownVersion(f"Request for unknown model: '{name}' version {version} is not found")

    def readiness_problems(self) -> dict[str, str]:
        return {}

    def model_ready(self, name: str, version: str) -> bool:
        self._check(name, version)
        return self.is_server_ready

    def model_metadata(self, name: str, version: str) -> ModelMetadata:
        self._check(name, version)
        tensor = TensorMetadata("IN", "FP32", (-1, 4))
        return ModelMetadata(MODEL, ("1",), "onnxruntime_onnx", (tensor,), (tensor,))

    async def bring(self, name: str, version: str = "", *, deadline_ns: int = 0) -> None:
        pass

    def foresee(self, name: str, version: str = "") -> tuple[int, ModelSignature]:
        self._check(name, version)
        return 1, ModelSignature((), ())

    def model_config(self, name: str, version: str) -> ModelConfigDocument:
        self._check(name, version)
        return ModelConfigDocument()

    def statistics(self, name: str = "", version: str = "") -> list[ModelStatistics]:
        if name:
            self._check(name, version)
        batch = BatchStatistics(4, Duration(1, 10), Duration(1, 20), Duration(1, 30))
        return [
            ModelStatistics(
                MODEL,
                "1",
                last_inference_ms=1700000000000,
                inference_count=5,
                execution_count=2,
                success=Duration(3, 99),
                batches=(batch,),
            )
        ]

    def repository_index(self, ready_only: bool) -> list[ModelIndexEntry]:
        ready = ModelIndexEntry(MODEL, "1", ModelState.READY)
        if ready_only:
            return [ready]
        broken = ModelIndexEntry("broken", "2", ModelState.UNAVAILABLE, "load failed for model 'broken': no artefact")
        return [ready, broken, ModelIndexEntry("idle", "", ModelState.UNKNOWN)]

    async def load_model(
        self, name: str, config_json: str | None = None, files: Mapping[str, bytes] | None = None
    ) -> None:
        if self.failure is not None:
            raise self.failure
        self.calls.append(("load", name, config_json, dict(files or {})))

    async def unload_model(self, name: str, unload_dependents: bool = False) -> None:
        self.calls.append(("unload", name, unload_dependents))


class Door:
    """A running REST server, its planes, and a plain HTTP client to it."""

    def __init__(self, server: RestServer, plane: EchoPlane, control: RecordingControl, port: int) -> None:
        self.server = server
        self.plane = plane
        self.control = control
        self.port = port
        self.url = f"127.0.0.1:{port}"
        self.http = httpx.AsyncClient(base_url=f"http://{self.url}", verify=False, timeout=20)

    async def post_infer(self, document: object, *, path: str = f"/v2/models/{MODEL}/infer") -> httpx.Response:
        return await self.http.post(path, json=document)


LIMITS = RestLimits(max_body_bytes=1 << 20, max_json_bytes=1 << 18, body_idle_timeout_s=20)


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    plane, control = EchoPlane(), RecordingControl()
    server = RestServer(plane, control, port=0, limits=LIMITS)
    opened = Door(server, plane, control, await server.start())
    try:
        yield opened
    finally:
        await opened.http.aclose()
        await server.stop(5)
