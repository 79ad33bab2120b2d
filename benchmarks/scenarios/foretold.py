"""How well the simulation foretells a real server: ``foretold.py FOLDER [MODEL ...]``.

A server on CPU 0 and a caller on CPU 1. Each model first serves a few seconds of mixed traffic, of which its run times,
their spread and what holds them up are learnt, as a tuner would. Then cells, a rate, a cap and a kind of traffic each,
are foretold from the times at which their requests were sent: with what was learnt before, and with what was learnt
meanwhile (which leaves out how much the machine itself changes). Latencies are the server's own, from the whole message
to the encoded answer, as a tuner sees them; ``outside`` is what the caller saw, with its own time and the sockets'.
FOLDER has the ONNX models of ``benchmarks/models/make.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from aiorch_proto.v2 import inference_pb2 as pb
from onnx import TensorProto, helper, numpy_helper, save_model

sys.path.append(str(Path(__file__).resolve().parents[2]))

from aiorch_server._core import Simulation, simulate
from aiorch_server.optimizer.arrivals import OnOff
from aiorch_server.optimizer.predict import Surroundings
from aiorch_server.optimizer.service_time import ServiceTime
from aiorch_server.optimizer.window import Window
from aiorch_server.types import RunObservation, SchedulerObservation
from benchmarks.peers.process import raise_priority

HERE = Path(__file__).resolve().parent
_STEP_S = 1.0
#: Requests/s that the caller keeps up with, and what a request costs the door at most: only to choose rates by.
MAX_RATE, DOOR_US = 5000.0, 25.0
REPETITIONS = 9
ROWS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, slots=True)
class Model:
    """``cost``: what a batch of 1 and of 32 takes about, in us: only to choose the first rates by."""

    name: str
    backend: str
    cost: tuple[float, float]


MODELS = {
    "identity": Model("identity", "identity", (30.0, 60.0)),
    "mlp": Model("mlp", "onnxruntime", (20.0, 200.0)),
    "wide": Model("wide", "onnxruntime", (700.0, 4000.0)),
    "minilm": Model("minilm", "onnxruntime", (9000.0, 380000.0)),
}


@dataclass(frozen=True, slots=True)
class Cell:
    load: float
    cap: int
    is_bursty: bool


CELLS = [Cell(load, cap, bursty) for load in (0.3, 0.6, 0.8) for cap in (1, 8, 32) for bursty in (False, True)]


def write_repository(folder: Path, model: Model, onnx: Path, objective: str = "") -> bytes:
    """The model's folder in a repository, left as written or tuned to the objective; a request for one row of it."""
    request = pb.ModelInferRequest(model_name=model.name)
    head = f'name: "{model.name}" backend: "{model.backend}" max_batch_size: 32\ndynamic_batching {{ }}\n'
    head += "instance_group [ { count: 1 kind: KIND_CPU } ]\n"
    key, text = ("objective", objective) if objective else ("tuning", "off")
    head += f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}\n'
    (folder / model.name / "1").mkdir(parents=True)
    if model.backend == "identity":
        head += 'input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 4 ] } ]\n'
        head += 'output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 4 ] } ]\n'
        request.inputs.add(name="INPUT0", datatype="FP32", shape=(1, 4))
        request.raw_input_contents.append(bytes(16))
    elif model.name == "wide":
        write_wide(folder / model.name / "1" / "model.onnx")
        request.inputs.add(name="x", datatype="FP32", shape=(1, 1024))
        request.raw_input_contents.append(np.ones(1024, np.float32).tobytes())
    else:
        shutil.copy(onnx / f"{model.name}.onnx", folder / model.name / "1" / "model.onnx")
        with np.load(onnx / f"{model.name}.npz") as rows:
            for name, values in rows.items():
                datatype = {"float32": "FP32", "int64": "INT64"}[str(values.dtype)]
                request.inputs.add(name=name, datatype=datatype, shape=(1, *values.shape[1:]))
                request.raw_input_contents.append(values[:1].tobytes())
    (folder / model.name / "config.pbtxt").write_text(head)
    return request.SerializeToString()


def write_wide(path: Path) -> None:
    """Three dense layers, 1024-2048-2048-16: weights that are read once for a batch, so that batches pay."""
    random = np.random.default_rng(1)
    sizes, nodes, weights, name = (1024, 2048, 2048, 16), [], [], "x"
    for layer, (taken, given) in enumerate(itertools.pairwise(sizes)):
        values = random.standard_normal((taken, given), np.float32) / math.sqrt(taken)
        weights.append(numpy_helper.from_array(values.astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [name, f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [name := f"y{layer}"]))
    ends = [
        helper.make_tensor_value_info(each, TensorProto.FLOAT, ["n", size]) for each, size in (("x", 1024), (name, 16))
    ]
    graph = helper.make_graph(nodes, "wide", ends[:1], ends[1:], weights)
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


class Watched:
    """A server process that tells what its tuner would see."""

    def __init__(self, repository: Path, cpu: int = 0) -> None:
        self._process = subprocess.Popen(
            ["taskset", "-c", str(cpu), sys.executable, str(HERE / "watched.py"), str(repository)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.has_priority = raise_priority(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)

    def tell(self, **policy: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(policy) + "\n")
        self._process.stdin.flush()
        told: dict[str, Any] = json.loads(self._process.stdout.readline())
        return told


def read_observation(told: dict[str, Any], model: str) -> SchedulerObservation:
    stored = dict(told["models"][model])
    stored["runs"] = tuple(
        RunObservation(**{**run, "times": {int(upper): count for upper, count in run["times"].items()}})
        for run in stored["runs"]
    )
    stored["durations"] = {int(upper): count for upper, count in stored["durations"].items()}
    return SchedulerObservation(**stored)


@dataclass(slots=True)
class Knowledge:
    """What a tuner has learnt of a model on this machine."""

    service: ServiceTime = field(default_factory=lambda: ServiceTime(32, half_life_s=60.0))

    def learn(self, window: Window) -> None:
        self.service.observe(window.runs, instances=1, now_s=window.end_s)

    def foretell(self, times_ns: np.ndarray, cap: int, random: np.random.Generator) -> list[Simulation]:
        """What may become of these requests: noise and stalls differ."""
        return [self._simulate(times_ns, cap, random) for _ in range(REPETITIONS)]

    def _simulate(self, times_ns: np.ndarray, cap: int, random: np.random.Generator) -> Simulation:
        truth, spread = self.service.curve(), self.service.spread()
        gaps_ns, stalls_ns = Surroundings(stalls=self.service.stalls()).draw_stalls(2000, random)
        return simulate(
            times_ns, truth=truth, max_rows=cap, spreads=[math.sqrt(math.log1p(spread**2))] * len(truth),
            noise=random.standard_normal(5000), stall_gaps_ns=gaps_ns, stalls_ns=stalls_ns,
        )  # fmt: skip


class Bench:
    """A watched server with one model, and its caller."""

    def __init__(self, server: Watched, model: Model, message: bytes, folder: Path) -> None:
        self.server, self.model, self.folder = server, model, folder
        (folder / "message").write_bytes(message)
        self.told = server.tell()

    def drive(self, times_ns: np.ndarray, cap: int, known: Knowledge) -> tuple[dict[str, np.ndarray], Window]:
        """Sends requests at these times; what is known grows each second. What the caller saw, and what the server."""
        np.savez(self.folder / "times.npz", times_ns=times_ns)
        self.server.tell(max_rows=cap)
        first = self.told = self.server.tell()
        arguments = [str(self.told["port"]), *(str(self.folder / name) for name in ("times.npz", "message", "out.npz"))]
        caller = subprocess.Popen(["taskset", "-c", "1", sys.executable, str(HERE / "timed.py"), *arguments])
        while caller.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                caller.wait(_STEP_S)
            before, self.told = self.told, self.server.tell()
            known.learn(self._window(before))
        assert caller.returncode == 0, "the caller failed"
        with np.load(self.folder / "out.npz") as stored:
            return dict(stored), self._window(first)

    def _window(self, before: dict[str, Any]) -> Window:
        return Window.between(read_observation(before, self.model.name), read_observation(self.told, self.model.name))


def run_model(model: Model, onnx: Path, cells: Sequence[Cell], seconds: float, requests: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        message = write_repository(folder / "models", model, onnx)
        with Watched(folder / "models") as server:
            bench = Bench(server, model, message, folder)
            before = Knowledge()
            for cap, load in ((1, 0.5), (8, 0.9), (32, 0.9)):
                rate = rate_of(model.cost[0], model.cost[1], cap, load)
                process = OnOff(1.6 * rate, 0.4 * rate, 0.2, 0.2)
                bench.drive(process.draw(min(seconds, requests / rate), random), cap, before)
            learnt = dict(before.service.curve())
            shown = {rows: round(learnt[rows] / 1e6, 3) for rows in ROWS}
            print(f"{model.name}: ms by rows {shown}", "" if server.has_priority else "without precedence on its core")
            return [run_cell(bench, before, cell, seconds, requests, random) for cell in cells]


def rate_of(one: float, many: float, cap: int, load: float) -> float:
    """Requests/s that load an instance so much, from the time in us of a batch of 1 and of 32."""
    return load * min(MAX_RATE, cap / ((one + (many - one) * (cap - 1) / 31 + DOOR_US * cap) * 1e-6))


def run_cell(
    bench: Bench, before: Knowledge, cell: Cell, seconds: float, requests: int, random: np.random.Generator
) -> dict[str, Any]:
    curve = dict(before.service.curve())
    rate = rate_of(curve[1] / 1e3, curve[32] / 1e3, cell.cap, cell.load)
    process = OnOff(1.7 * rate, 0.3 * rate, 0.1, 0.1) if cell.is_bursty else OnOff.steady(rate)
    meanwhile = Knowledge()
    out, window = bench.drive(process.draw(min(seconds, requests / rate), random), cell.cap, meanwhile)
    is_right = out["code"] == 0
    times_ns = np.maximum.accumulate(out["sent_ns"] - out["sent_ns"][0])
    outside = (out["answered_ns"] - out["sent_ns"])[is_right]
    row: dict[str, Any] = {
        "model": bench.model.name, **dataclasses.asdict(cell), "rate": round(rate), "answers": int(is_right.sum()),
        "lost": int((~is_right).sum()), "lag_p99_us": float(np.quantile(out["sent_ns"] - out["due_ns"], 0.99)) / 1e3,
        "busy": window.busy, "rows_per_batch": window.answered_rows / sum(run.executions for run in window.runs),
        "spread": meanwhile.service.spread(), "stalls": len(meanwhile.service.stalls().lengths_ns),
    }  # fmt: skip
    done = {"before": before.foretell(times_ns, cell.cap, random)}
    done["meanwhile"] = meanwhile.foretell(times_ns, cell.cap, random)
    for quantile, key in ((0.5, "p50"), (0.99, "p99")):
        inside = window.percentile(quantile)
        assert inside is not None
        row[key] = {"inside_us": inside.value_ns / 1e3, "outside_us": float(np.quantile(outside, quantile)) / 1e3}
        for name, each in done.items():
            found = [float(np.quantile(one.latencies_ns, quantile)) / 1e3 for one in each]
            row[key][name], row[key][f"{name}_span"] = float(np.median(found)), (min(found), max(found))
    row["foretold_rows"] = float(np.mean([one.batch_rows.mean() for one in done["meanwhile"]]))
    print(describe(row), flush=True)
    return row


def describe(row: dict[str, Any]) -> str:
    text = f"{row['model']:8} load {row['load']:.1f} cap {row['cap']:2} {'bursts ' if row['is_bursty'] else 'Poisson'}"
    text += f" {row['rate']:5}/s busy {row['busy']:.2f} rows {row['rows_per_batch']:5.2f} ({row['foretold_rows']:5.2f})"
    for key in ("p50", "p99"):
        marks = row[key]
        text += f"  {key} {marks['inside_us']:7.0f} us x{marks['before'] / marks['inside_us']:.2f}"
        text += f" x{marks['meanwhile'] / marks['inside_us']:.2f} (outside {marks['outside_us']:.0f})"
    return text + f" spread {row['spread']:.2f} stalls {row['stalls']} lag {row['lag_p99_us']:.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--requests", type=int, default=8000)
    parser.add_argument("--cells", default="", help="numbers of the cells, with commas; all")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cells = [CELLS[int(each)] for each in options.cells.split(",")] if options.cells else CELLS
    rows: list[dict[str, Any]] = []
    for name in options.models:
        rows += run_model(MODELS[name], options.onnx, cells, options.seconds, options.requests)
    for name in ("before", "meanwhile"):
        good = sum(abs(row["p99"][name] / row["p99"]["inside_us"] - 1) <= 0.15 for row in rows)
        print(f"p99 foretold within 15 %, run times learnt {name}: {good} of {len(rows)} cells")
    if options.output:
        options.output.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
