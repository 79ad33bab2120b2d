"""The real model in this process, behind the server's own gRPC door, and a process of its own that asks it."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from aiorch_client import Client, InferRequest
from aiorch_client.loadgen import LoadPlan, LoadResult, run_load
from aiorch_client.messages import encode_infer

from aiorch_server.app import Application
from aiorch_server.cli.output import CommandError, ExitCode, UsageError
from aiorch_server.cli.tensors import make_inputs
from aiorch_server.config.objective import Objective
from aiorch_server.config.problems import suggest
from aiorch_server.config.server import ServerConfig
from aiorch_server.execution.thread_executor import InstanceGroup
from aiorch_server.lifecycle.servable import Servable
from aiorch_server.optimizer.arrivals import Trace
from aiorch_server.optimizer.optimizer import ServableLevers
from aiorch_server.optimizer.predict import Knobs
from aiorch_server.optimizer.search import MARGIN
from aiorch_server.optimizer.service_time import ServiceTime
from aiorch_server.optimizer.window import Window

_NS_PER_S: Final = 1_000_000_000
_TIMEOUT_S: Final = 30.0
#: A curve from the times that runs took a while ago is as good as one from those of now.
_HALF_LIFE_S: Final = 600.0
#: Bytes of one message: a trial of larger ones would measure the network.
_MAX_MESSAGE_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True)
class Trial:
    """What the server itself saw of a load: a percentile of the answers with its 95 % bounds, and good answers."""

    requests: int
    answered: int
    good: float
    goodput: float
    percentile_ms: float | None
    low_ms: float | None
    high_ms: float | None


class ProvingGround:
    """One loaded model, alone in its server, with nothing that moves its knobs."""

    def __init__(self, port: int, servable: Servable, cores: int, asker: ProcessPoolExecutor) -> None:
        self._target, self._asker = f"127.0.0.1:{port}", asker
        self.model, self.version = servable.name, servable.version
        self._levers = ServableLevers(servable)
        self.largest_rows = self._levers.largest_rows
        self.can_grow = self._levers.can_grow
        self.written_instances = self._levers.serving
        self.service_time = ServiceTime(self.largest_rows, half_life_s=_HALF_LIFE_S, cores=float(cores))
        self._is_batching = servable.signature.max_batch_size > 0
        self._messages: dict[int, bytes] = {}

    def check(self, trace: Trace) -> None:
        """UsageError where a request has more rows than the model takes."""
        if (rows := int(trace.rows.max())) > self.largest_rows:
            raise UsageError(f"there are requests of {rows} rows; '{self.model}' takes at most {self.largest_rows}")

    async def measure(self, counts: list[int], seconds: float, on_progress: Callable[[float], None]) -> None:
        """Learns how long batches take, of each size by powers of two and with each number of instances."""
        sizes = sorted({min(1 << power, self.largest_rows) for power in range(self.largest_rows.bit_length() + 1)})
        cells = [(count, rows) for count in counts for rows in sizes]
        for number, (count, rows) in enumerate(cells, 1):
            await self._levers.set_instances(count)
            self._levers.set_policy(
                max_rows=rows, delay_us=0, target_us=0, margin_us=0, is_deferring=False, is_shedding=False, curve=()
            )
            before = self._levers.observe()
            plan = LoadPlan(
                self._target,
                [await self._encode(rows)],
                duration_s=seconds / len(cells),
                warm_up_s=0.0,
                streams=count,
                timeout_s=_TIMEOUT_S,
            )
            result = await self._ask(plan)
            window = Window.between(before, self._levers.observe())
            if not window.runs:
                raise CommandError(f"model '{self.model}' answered no request: {result.errors}", ExitCode.REFUSED)
            self.service_time.observe(window.runs, instances=count, now_s=window.end_s)
            on_progress(number / len(cells))

    async def verify(self, knobs: Knobs, objective: Objective, trace: Trace) -> Trial:
        """Offers the trace to the real model under these knobs."""
        await self._levers.set_instances(knobs.instances)
        self._levers.set_policy(
            max_rows=knobs.max_rows,
            delay_us=knobs.delay_us,
            target_us=objective.latency_us,
            margin_us=round(objective.latency_us * MARGIN),
            is_deferring=knobs.is_deferring,
            is_shedding=knobs.is_shedding,
            curve=self.service_time.curve(knobs.instances),
        )
        requests = [await self._encode(rows) for rows in trace.rows.tolist()]
        before = self._levers.observe()
        await self._ask(
            LoadPlan(
                self._target,
                requests,
                duration_s=max(0.1, trace.duration_s + 1e-6),
                warm_up_s=0.0,
                channels=4,
                due_ns=trace.times_ns.tolist(),
                timeout_s=_TIMEOUT_S,
            )
        )
        window = Window.between(before, self._levers.observe())
        found = window.percentile(objective.percentile / 100.0)
        high_ns = found.high_ns if found is not None and np.isfinite(found.high_ns) else None
        return Trial(
            requests=len(trace),
            answered=window.answered,
            good=window.in_time / len(trace),
            goodput=window.in_time / max(trace.duration_s, 1e-9),
            percentile_ms=found.value_ns / 1e6 if found is not None else None,
            low_ms=found.low_ns / 1e6 if found is not None else None,
            high_ms=high_ns / 1e6 if high_ns is not None else None,
        )

    async def _ask(self, plan: LoadPlan) -> LoadResult:
        return await asyncio.get_running_loop().run_in_executor(self._asker, run_load, plan)

    async def _encode(self, rows: int) -> bytes:
        if rows not in self._messages:
            self._messages[rows] = await asyncio.to_thread(self._make_message, rows)
        return self._messages[rows]

    def _make_message(self, rows: int) -> bytes:
        with Client(self._target, timeout_s=_TIMEOUT_S) as client:
            metadata = client.metadata(self.model)
            values = make_inputs(
                metadata, rows=rows, is_batching=self._is_batching, shapes={}, generator=np.random.default_rng(0)
            )
            client.infer(self.model, values)  # one that cannot work is told before the load
            message: bytes = encode_infer(InferRequest(self.model, values), metadata).SerializeToString()
        if len(message) > _MAX_MESSAGE_BYTES:
            raise CommandError(f"a request of {rows} rows has {len(message):,} bytes", ExitCode.REFUSED)
        return message


@asynccontextmanager
async def open_ground(model: str, repository: Path, *, allow_code: bool, cores: int) -> AsyncIterator[ProvingGround]:
    """Loads the model; UsageError where the repository has none of that name, CommandError where it does not load."""
    _check_is_there(model, repository)
    config = ServerConfig.model_validate(
        {
            "repository": {"paths": [str(repository)]},
            "lifecycle": {"control_mode": "explicit", "load_models": [model]},
            "grpc": {"port": 0},
            "http": {"enabled": False},
            "metrics": {"enabled": False},
            "execution": {"allow_code": allow_code},
        }
    )
    context = multiprocessing.get_context("spawn")  # a fork would take the server's threads' locks along
    with ProcessPoolExecutor(1, mp_context=context) as asker:
        async with Application(config) as app:
            if app.optimizer is not None:
                await app.optimizer.stop()
            servables = [each for each in app.manager.servables() if each.name == model]
            if not servables:
                reasons = [entry.reason for entry in app.manager.index_model(model) if entry.reason]
                raise CommandError(f"model '{model}' does not load: {'; '.join(reasons)}", ExitCode.REFUSED)
            servable = servables[-1]
            if servable.plain_scheduler is None or not isinstance(servable.instances, InstanceGroup):
                raise CommandError(f"model '{model}' has no queue of its own to tune", ExitCode.REFUSED)
            assert app.grpc_port is not None
            yield ProvingGround(app.grpc_port, servable, cores, asker)


def _check_is_there(model: str, repository: Path) -> None:
    if not (repository / model).is_dir():
        known = sorted(each.name for each in repository.iterdir() if each.is_dir())
        raise UsageError(f"{repository} holds no model '{model}'{suggest(model, known) if known else ''}")
