"""A group of instances on a scheduler, without a server: for tests of what happens to batches and instances."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import numpy as np

from aiorch_server._core import Mailbox, ModelSpec, Scheduler, decode_response, encode_request
from aiorch_server.backend import Backend, DeclaredSignature, LoadContext, ModelInstance
from aiorch_server.errors import AiorchError
from aiorch_server.execution.thread_executor import InstanceGroup
from aiorch_server.execution.warmup import WarmupSample
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec

SIGNATURE = ModelSignature(
    (TensorSpec("X", DataType.INT32, (1,)),), (TensorSpec("Y", DataType.INT32, (1,)),), max_batch_size=8
)
Execute = Callable[[NumpyArray], NumpyArray]


class Instance(ModelInstance):
    def __init__(self, execute: Execute) -> None:
        self.run = execute
        self.thread = threading.current_thread()
        self.closed: list[threading.Thread] = []

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return {"Y": self.run(inputs["X"])}

    def close(self) -> None:
        self.closed.append(threading.current_thread())


class ScriptedBackend(Backend):
    """Runs the function of the test; ``load_one`` may fail or wait."""

    name = "scripted"

    def __init__(self, execute: Execute, load_one: Callable[[LoadContext], None] = lambda context: None) -> None:
        self.execute = execute
        self.load_one = load_one
        self.instances: list[Instance] = []

    def inspect(self, context: LoadContext) -> ModelSignature:
        return SIGNATURE

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        self.load_one(context)
        self.instances.append(Instance(self.execute))
        return self.instances[-1]


class Rig:
    """A scheduler, a group on it, and a mailbox to put requests in."""

    def __init__(self, backend: ScriptedBackend, instances: int, warmup: list[WarmupSample], isolate: bool) -> None:
        self.spec = ModelSpec("m", 1, SIGNATURE)
        # A delay, so that requests which are submitted together meet in one batch.
        self.scheduler = Scheduler(self.spec, max_queue_delay_us=50_000, preferred_batch_sizes=[4])
        contexts = [
            LoadContext("m", 1, Path("m"), Path("m/1"), DeclaredSignature(), instance_index=index)
            for index in range(instances)
        ]
        self.group = InstanceGroup(
            "m:1", self.scheduler, backend, SIGNATURE, contexts, warmup, isolate_failures=isolate
        )
        self.mailbox = Mailbox(asyncio.get_running_loop())

    def submit(self, value: int) -> asyncio.Future[bytes]:
        data = np.array([[value]], np.int32).tobytes()
        return self.mailbox.submit(self.scheduler, encode_request("m", "", "", [("X", "INT32", (1, 1), data)], []))

    async def answers(self, *values: int) -> list[int | tuple[int, str]]:
        """The value of each request, or the code and text it failed with, all submitted at once."""
        results = await asyncio.wait_for(
            asyncio.gather(*(self.submit(value) for value in values), return_exceptions=True), 10
        )
        return [read(result) for result in results]


def read(result: bytes | BaseException) -> int | tuple[int, str]:
    if isinstance(result, AiorchError):
        return int(result.code), str(result)
    assert isinstance(result, memoryview)
    return int(np.frombuffer(decode_response(result)[3][0][3], np.int32)[0])


@contextlib.asynccontextmanager
async def running(
    backend: ScriptedBackend,
    *,
    instances: int = 1,
    warmup: list[WarmupSample] | None = None,
    isolate: bool = True,
    timeout_s: float = 10,
) -> AsyncIterator[Rig]:
    rig = Rig(backend, instances, warmup or [], isolate)
    try:
        await asyncio.to_thread(rig.group.start, timeout_s)
        yield rig
    finally:
        rig.scheduler.close()
        rig.mailbox.close()
