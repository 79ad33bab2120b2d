"""The servers of the comparison: how each is installed, configured and started."""

from __future__ import annotations

import importlib.metadata
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
from benchmarks.peers.workload import DIGITS, IDENTITY, Workload

PYTRITON = "0.7.0"
MAX_BATCH = 64
_C_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
_OUR_BACKENDS = {IDENTITY: "identity", DIGITS: "onnxruntime"}
_OUR_BACKEND_CLASSES = ("aiorch_backends.identity:IdentityBackend", "aiorch_backends.onnxruntime:OnnxRuntimeBackend")
_TRITON_BACKENDS = {IDENTITY: "aiorch_identity", DIGITS: "python"}
_SELF_DESCRIBING = {"onnxruntime"}  # reads its tensors from the file
_HERE = Path(__file__).resolve().parent
_SOURCES = [ROOT, ROOT / "backends", ROOT / "clients" / "python", ROOT / "proto"]


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """How to start one server on a port; ``settings`` is what a reader should know, without paths."""

    name: str
    title: str
    settings: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def plan_aiorch(
    cache: Path, workloads: Sequence[Workload], repository: Path, port: int, transport: str = "native"
) -> ServerPlan:
    """This project's server, from its console script or, when it is not installed, from the checkout."""
    script = Path(sysconfig.get_path("scripts")) / "aiorch"
    start = [str(script)] if script.exists() else [sys.executable, "-m", "aiorch_server.cli"]
    paths = [] if script.exists() else [str(path) for path in _SOURCES]
    models = _write_models(cache / "aiorch-repository", workloads, repository, _OUR_BACKENDS)
    command = [*start, "serve", "--model-repository", str(models), "--transport", transport]
    command += ["--grpc-port", str(port), "--http-port", "0", "--metrics-port", "0"]
    if not script.exists():  # entry points come with installation
        for backend in _OUR_BACKEND_CLASSES:
            command += ["--backend", backend]
    return ServerPlan(
        name="aiorch",
        title="AIOrchestrator",
        settings=f"{transport} transport, dynamic batching, max_batch_size {MAX_BATCH}, 1 instance, 1 thread",
        command=command,
        environment={"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])},
    )


def plan_grpc_aio(repository: Path, port: int) -> ServerPlan:
    """The plain grpc.aio server of ``naive_grpc_aio.py``."""
    command = [sys.executable, str(_HERE / "naive_grpc_aio.py"), "--port", str(port)]
    command += ["--onnx", str(repository / DIGITS / "1" / "model.onnx"), "--onnx-name", DIGITS]
    version = importlib.metadata.version("grpcio")
    return ServerPlan(
        name="grpc_aio",
        title="grpc.aio",
        settings=f"grpcio {version} with generated stubs on uvloop, model called in the method, no batching, 1 thread",
        command=command,
    )


def plan_triton(cache: Path, workloads: Sequence[Workload], repository: Path, port: int, out: Console) -> ServerPlan:
    """NVIDIA's server from nvidia-pytriton, with a native identity backend and its python backend for digits."""
    environment = _ensure_pytriton(cache / f"triton-{PYTRITON}", out)
    packages = next(environment.glob("lib/python*/site-packages"))
    backends = _write_backends(cache / "triton-backends", packages / "pytriton" / "tritonserver")
    models = _write_models(cache / "triton-repository", workloads, repository, _TRITON_BACKENDS)
    shutil.copy(_HERE / "triton" / "model.py", models / DIGITS / "1")
    command = [str(packages / "pytriton" / "tritonserver" / "bin" / "tritonserver")]
    command += [f"--model-repository={models}", f"--backend-directory={backends}", "--allow-http=false"]
    command += ["--allow-metrics=false", "--grpc-address=127.0.0.1", f"--grpc-port={port}"]
    libraries = [packages / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR"))]
    return ServerPlan(
        name="triton",
        title="Triton",
        settings=f"Triton 2.51 of nvidia-pytriton {PYTRITON}; identity: native C backend; digits: python backend, one "
        f"onnxruntime call per batch; dynamic_batching {{}}, max_batch_size {MAX_BATCH}, 1 CPU instance, 1 thread",
        command=command,
        environment={
            "LD_LIBRARY_PATH": os.pathsep.join(str(path) for path in libraries),
            "PATH": os.pathsep.join([str(environment / "bin"), os.environ["PATH"]]),
            "PYTHONPATH": str(packages),
        },
    )


def _ensure_pytriton(environment: Path, out: Console) -> Path:
    """A virtual environment with the server; made once, and only whole (the stamp is written last)."""
    stamp = environment / "complete"
    wanted = [f"nvidia-pytriton=={PYTRITON}", f"onnxruntime=={importlib.metadata.version('onnxruntime')}"]
    if stamp.exists() and stamp.read_text(encoding="utf-8") == "\n".join(wanted):
        return environment
    out.print(f"installing {' '.join(wanted)} (about 200 MB, once)")
    venv.create(environment, with_pip=True, clear=True)
    subprocess.run(
        [str(environment / "bin" / "python"), "-m", "pip", "install", "-qq", *wanted], check=True, timeout=900
    )
    stamp.write_text("\n".join(wanted), encoding="utf-8")
    return environment


def _write_backends(folder: Path, triton: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "python"
    python.mkdir(parents=True)
    stub = triton / "python_backend_stubs" / f"{sys.version_info[0]}.{sys.version_info[1]}"
    for source in [*(triton / "backends" / "python").glob("*.*"), stub / "triton_python_backend_stub"]:
        (python / source.name).symlink_to(source)
    identity = folder / "aiorch_identity"
    identity.mkdir()
    library = identity / "libtriton_aiorch_identity.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("no C compiler found: the native backend for Triton needs gcc or cc")
    subprocess.run(
        [compiler, *_C_FLAGS, "-o", str(library), str(_HERE / "triton" / "identity.c")],
        check=True,
        timeout=60,
    )
    return folder


def _write_models(folder: Path, workloads: Sequence[Workload], repository: Path, backends: Mapping[str, str]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for workload in workloads:
        version = folder / workload.model / "1"
        version.mkdir(parents=True)
        config = describe_model(workload, backends[workload.model])
        (version.parent / "config.pbtxt").write_text(config, encoding="utf-8")
    shutil.copy(repository / DIGITS / "1" / "model.onnx", folder / DIGITS / "1")
    return folder


def describe_model(workload: Workload, backend: str) -> str:
    """The model's ``config.pbtxt``, the same for both servers that read it but for the backend's name."""
    tensors = [(kind, tensor) for kind in ("input", "output") for tensor in getattr(workload, f"{kind}s")]
    lines = [f'name: "{workload.model}"', f'backend: "{backend}"', f"max_batch_size: {MAX_BATCH}"]
    for kind, tensor in tensors if backend not in _SELF_DESCRIBING else []:
        # dims must not be empty; Triton does not hold a backend's outputs against them, so [batch] stays [batch].
        dims = ", ".join(str(size) for size in tensor.dims) or "1"
        lines.append(f'{kind} [ {{ name: "{tensor.name}" data_type: TYPE_{tensor.datatype} dims: [ {dims} ] }} ]')
    return "\n".join([*lines, "dynamic_batching { }", "instance_group [ { count: 1 kind: KIND_CPU } ]", ""])
