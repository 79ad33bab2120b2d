"""The servers of the comparison but for Triton: how each is installed, configured and started."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from benchmarks.machine import ROOT
from benchmarks.peers.wires import Grpc, RawHttp, Wire
from benchmarks.peers.workload import DATATYPES, Workload

MOSEC = "0.9.8"
HERE = Path(__file__).resolve().parent
_OUR_BACKEND_CLASSES = (
    "aiorch_backends.identity:IdentityBackend",
    "aiorch_backends.onnxruntime:OnnxRuntimeBackend",
    "aiorch_backends.python:PythonBackend",
)
_SOURCES = [ROOT, ROOT / "backends", ROOT / "clients" / "python", ROOT / "proto"]


@dataclass(frozen=True, slots=True)
class Certificate:
    """PEM files of a certificate for 127.0.0.1 that signs itself, and its key."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Situation:
    """What a server has to serve and how; ``folder`` is private to this server and contest."""

    workload: Workload
    port: int
    folder: Path
    cache: Path
    certificate: Certificate | None = None
    is_busy: bool = False

    @property
    def grpc(self) -> Grpc:
        return Grpc(self.certificate.certificate if self.certificate else None)


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """How to start one server and speak to it; ``settings`` is what a reader should know, without paths."""

    name: str
    title: str
    settings: str
    wire: Wire
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def plan_aiorch(
    situation: Situation, *, name: str = "aiorch", io_threads: int | None = None, switch_interval_us: int | None = None
) -> ServerPlan:
    """This project's server."""
    backend = "identity" if situation.workload.onnx is None else "onnxruntime"
    models = write_repository(situation, backend, signature=backend == "identity")
    if situation.is_busy:
        (models / "busy_thread" / "1").mkdir(parents=True)
        shutil.copy(HERE / "busy_thread.py", models / "busy_thread" / "1" / "model.py")
    command, environment = find_aiorch()
    command += ["--model-repository", str(models)]
    command += ["--grpc-port", str(situation.port), "--http-port", "0", "--metrics-port", "0"]
    if io_threads is not None:
        command += ["--io-threads", str(io_threads)]
    if switch_interval_us is not None:
        command += ["--set", f"execution_switch_interval_us={switch_interval_us}"]
    if situation.certificate:
        command += ["--grpc-server-cert", str(situation.certificate.certificate)]
        command += ["--grpc-server-key", str(situation.certificate.key)]
    title = "AIOrchestrator" if io_threads is None else f"AIOrchestrator, --io-threads {io_threads}"
    return ServerPlan(
        name=name,
        title=title if switch_interval_us is None else f"{title}, switch interval {switch_interval_us / 1000:g} ms",
        settings="native transport, dynamic batching, 1 instance" + ("" if io_threads is None else ", asyncio driver"),
        wire=situation.grpc,
        command=command,
        environment=environment,
    )


def find_aiorch() -> tuple[list[str], dict[str, str]]:
    """The command ``aiorch serve`` and its environment: the console script or, when not installed, the checkout."""
    script = Path(sysconfig.get_path("scripts")) / "aiorch"
    own = os.environ.get("PYTHONPATH")
    if script.exists():
        return [str(script), "serve"], {"PYTHONPATH": own} if own else {}
    command = [sys.executable, "-m", "aiorch_server.cli", "serve"]
    for backend_class in _OUR_BACKEND_CLASSES:  # entry points come with installation
        command += ["--backend", backend_class]
    return command, {"PYTHONPATH": os.pathsep.join([*map(str, _SOURCES), *([own] if own else [])])}


def plan_aiorch_asyncio(situation: Situation) -> ServerPlan:
    """This project's server with its gRPC port on the event loop."""
    return plan_aiorch(situation, name="aiorch_asyncio", io_threads=0)


def plan_aiorch_asyncio_5ms(situation: Situation) -> ServerPlan:
    """The same with the switch interval that Python has by itself."""
    return plan_aiorch(situation, name="aiorch_asyncio_5ms", io_threads=0, switch_interval_us=5000)


def plan_grpc_aio(situation: Situation) -> ServerPlan:
    """The plain grpc.aio server of ``naive_grpc_aio.py``."""
    command = [sys.executable, str(HERE / "naive_grpc_aio.py"), "--port", str(situation.port)]
    if situation.workload.onnx:
        command += ["--onnx", str(situation.workload.onnx), "--onnx-name", situation.workload.model]
    if situation.certificate:
        command += ["--certificate", str(situation.certificate.certificate), "--key", str(situation.certificate.key)]
    version = importlib.metadata.version("grpcio")
    return ServerPlan(
        name="grpc_aio",
        title="grpc.aio",
        settings=f"grpcio {version} with generated stubs on uvloop, model called in the method, no batching",
        wire=situation.grpc,
        command=command,
    )


def plan_mosec(situation: Situation, out: Console) -> ServerPlan:
    """mosec (a front end in Rust, the model in a Python process) over plain HTTP with bare bytes."""
    wanted = [f"mosec=={MOSEC}", f"onnxruntime=={importlib.metadata.version('onnxruntime')}"]
    environment = ensure_environment(situation.cache / f"mosec-{MOSEC}", wanted, out)
    workload = situation.workload
    described = {
        "inputs": [(tensor.name, DATATYPES[tensor.datatype].name, tensor.dims) for tensor in workload.inputs],
        "onnx": str(workload.onnx) if workload.onnx else "",
        "max_batch": workload.max_batch,
    }
    command = [str(environment / "bin" / "python"), str(HERE / "mosec_server.py"), "--address", "127.0.0.1"]
    # Without --wait 0 a batch that is not full waits for 10 ms, and 1 ms is the least that its code can ask for.
    command += ["--port", str(situation.port), "--wait", "0", "--capacity", "8192", "--timeout", "60000"]
    return ServerPlan(
        name="mosec",
        title="mosec",
        settings=f"mosec {MOSEC}, HTTP/1.1 with bare bytes (c x s is c*s connections), --wait 0, 1 worker process",
        wire=RawHttp(),
        command=command,
        environment={"BENCH_WORKLOAD": json.dumps(described), "PYTHONPATH": ""},
    )


def ensure_environment(environment: Path, wanted: Sequence[str], out: Console) -> Path:
    """A virtual environment with these packages; made once, and only whole (the stamp is written last)."""
    stamp = environment / "complete"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == "\n".join(wanted):
        return environment
    out.print(f"installing {' '.join(wanted)} (once)")
    venv.create(environment, with_pip=True, clear=True)
    subprocess.run(
        [str(environment / "bin" / "python"), "-m", "pip", "install", "-qq", *wanted], check=True, timeout=900
    )
    stamp.write_text("\n".join(wanted), encoding="utf-8")
    return environment


def write_repository(situation: Situation, backend: str, *, signature: bool) -> Path:
    """A model repository with the workload's model; its configuration names the tensors if ``signature``."""
    models = situation.folder / "repository"
    shutil.rmtree(models, ignore_errors=True)
    version = models / situation.workload.model / "1"
    version.mkdir(parents=True)
    config = describe_model(situation.workload, backend, signature=signature)
    (version.parent / "config.pbtxt").write_text(config, encoding="utf-8")
    if situation.workload.onnx:
        shutil.copy(situation.workload.onnx, version / "model.onnx")  # a link out of the repository is refused
    return models


def describe_model(workload: Workload, backend: str, *, signature: bool) -> str:
    """The model's ``config.pbtxt``, the same for both servers that read it but for the backend and its needs."""
    tensors = [(kind, tensor) for kind in ("input", "output") for tensor in getattr(workload, f"{kind}s")]
    lines = [f'name: "{workload.model}"', f'backend: "{backend}"', f"max_batch_size: {workload.max_batch}"]
    for kind, tensor in tensors if signature else []:
        # dims must not be empty; Triton does not hold a backend's outputs against them, so [batch] stays [batch].
        dims = ", ".join(str(size) for size in tensor.dims) or "1"
        lines.append(f'{kind} [ {{ name: "{tensor.name}" data_type: TYPE_{tensor.datatype} dims: [ {dims} ] }} ]')
    return "\n".join([*lines, "dynamic_batching { }", "instance_group [ { count: 1 kind: KIND_CPU } ]", ""])


def make_certificate(folder: Path) -> Certificate:
    """A certificate for 127.0.0.1, made with openssl; subprocess.CalledProcessError when that fails."""
    made = Certificate(folder / "server.crt", folder / "server.key")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command += ["-keyout", str(made.key), "-out", str(made.certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return made
