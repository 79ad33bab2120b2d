"""Models with a weight, and a server in this process that loads them on demand within a budget."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import grpc
from patience import PATIENCE

from aiorch_server._core import decode_response, encode_request
from aiorch_server.app import Application
from aiorch_server.backend import Backend, LoadContext, ModelInstance
from aiorch_server.config.server import ServerConfig
from aiorch_server.errors import ModelLoadError
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec

TIMEOUT_S = 20.0 * PATIENCE
MIB = 1 << 20
INFER = "/inference.GRPCInferenceService/ModelInfer"
CONFIG = """
    backend: "ballast" max_batch_size: 8
    input { name: "INPUT0" data_type: TYPE_FP32 dims: [-1] }
    output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [-1] }
    instance_group { count: 1 kind: KIND_CPU }
"""
SIGNATURE = ModelSignature(
    (TensorSpec("INPUT0", DataType.FP32, (-1,)),), (TensorSpec("OUTPUT0", DataType.FP32, (-1,)),), max_batch_size=8
)


class BallastBackend(Backend):
    """``{"add": 1, "delay_ms": 5, "fail": "a text"}``; a model named in ``gates`` loads when its gate opens."""

    name = "ballast"
    artefacts = ("ballast.json",)
    runs_code = False
    loads: ClassVar[Counter[str]] = Counter()
    gates: ClassVar[dict[str, threading.Event]] = {}
    #: Models that run a batch with a negative number go on when it opens.
    running: ClassVar[threading.Event] = threading.Event()

    @classmethod
    def reset(cls) -> None:
        cls.loads.clear()
        cls.gates.clear()
        cls.running = threading.Event()

    def inspect(self, context: LoadContext) -> ModelSignature:
        return SIGNATURE

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        BallastBackend.loads[context.model_name] += 1
        if (gate := BallastBackend.gates.get(context.model_name)) is not None:
            gate.wait(TIMEOUT_S)
        manners = json.loads(Path(context.artefact).read_text())
        if "fail" in manners:
            raise ModelLoadError(manners["fail"])
        return BallastInstance(manners)


class BallastInstance(ModelInstance):
    def __init__(self, manners: Mapping[str, Any]) -> None:
        self._manners = manners

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        time.sleep(self._manners.get("delay_ms", 0) / 1e3)
        if (inputs["INPUT0"] < 0).any():
            BallastBackend.running.wait(TIMEOUT_S)
        return {"OUTPUT0": inputs["INPUT0"] + self._manners.get("add", 0)}


def write_model(
    root: Path, name: str, *, mib: float = 0, version: int = 1, config: str = CONFIG, **manners: Any
) -> None:
    """A model whose files take that much, most of it a hole in a file."""
    folder = root / name / str(version)
    folder.mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(config)
    (folder / "ballast.json").write_text(json.dumps(manners))
    if mib:
        with (folder / "weights").open("wb") as file:
            file.truncate(int(mib * MIB))


def write_ensemble(root: Path, name: str, *steps: str) -> None:
    """A chain of models."""
    (root / name / "1").mkdir(parents=True)
    written = "".join(
        f'step {{ model_name: "{step}" model_version: -1 '
        f'input_map {{ key: "INPUT0" value: "{f"t{i - 1}" if i else "INPUT0"}" }} '
        f'output_map {{ key: "OUTPUT0" value: "{f"t{i}" if i < len(steps) - 1 else "OUTPUT0"}" }} }}\n'
        for i, step in enumerate(steps)
    )
    (root / name / "config.pbtxt").write_text(
        CONFIG.replace('backend: "ballast"', 'platform: "ensemble"').replace(
            "instance_group { count: 1 kind: KIND_CPU }", ""
        )
        + f"ensemble_scheduling {{ {written} }}"
    )


def configure(
    root: Path, *, budget_mib: float = 0, on_demand: tuple[str, ...] = ("*",), **sections: Any
) -> ServerConfig:
    lifecycle = {
        "load_on_demand": list(on_demand),
        "memory_budget_bytes": int(budget_mib * MIB),
        "residence_secs": 0,
        "room_timeout_secs": 0.3,
        **sections.pop("lifecycle", {}),
    }
    return ServerConfig.model_validate(
        {
            "grpc": {"host": "127.0.0.1", "port": 0, "io_threads": 1},
            "http": {"enabled": False},
            "metrics": {"enabled": False},
            "repository": {"paths": [str(root)]},
            "execution": {
                "backends": ["demand_site:BallastBackend", "aiorch_backends.python:PythonBackend"],
                "allow_code": True,
            },
            "lifecycle": lifecycle,
            **sections,
        }
    )


class DemandSite:
    """A server and a channel to it."""

    def __init__(self, application: Application, channel: grpc.aio.Channel) -> None:
        self.application = application
        self.manager = application.manager
        self.channel = channel
        self._infer = channel.unary_unary(INFER)

    async def infer(self, model: str, value: float = 1.0, version: str = "", timeout: float = TIMEOUT_S) -> float:
        data = struct.pack("<f", value)
        message = encode_request(model, version, "", [("INPUT0", "FP32", (1, 1), data)])
        _, _, _, ((_, _, _, answer),) = decode_response(await self._infer(message, timeout=timeout))
        return float(struct.unpack("<f", answer)[0])

    async def refuse(self, model: str, **options: Any) -> tuple[grpc.StatusCode, str]:
        """The status of a request that must fail."""
        try:
            answer = await self.infer(model, **options)
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        raise AssertionError(f"'{model}' answered {answer}")

    def ready(self) -> list[str]:
        return [entry.name for entry in self.manager.index(ready_only=True)]

    def reason(self, model: str) -> str:
        return next(entry.reason for entry in self.manager.index() if entry.name == model)

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(config: ServerConfig) -> AsyncIterator[DemandSite]:
    BallastBackend.reset()
    application = Application(config)
    await application.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{application.grpc_port}") as channel:
            yield DemandSite(application, channel)
    finally:
        for gate in BallastBackend.gates.values():
            gate.set()
        BallastBackend.running.set()
        await application.stop(5.0)
