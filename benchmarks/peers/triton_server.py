"""NVIDIA Triton: installed from nvidia-pytriton, started without its Python front."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from rich.console import Console

from benchmarks.peers.servers import HERE, ServerPlan, Situation, ensure_environment, write_repository

PYTRITON = "0.7.0"
_C_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


def plan_triton(situation: Situation, out: Console) -> ServerPlan:
    """A native backend for identity, and the python backend with one onnxruntime call per batch for ONNX models."""
    wanted = [f"nvidia-pytriton=={PYTRITON}", f"onnxruntime=={importlib.metadata.version('onnxruntime')}"]
    environment = ensure_environment(situation.cache / f"triton-{PYTRITON}", wanted, out)
    packages = next(environment.glob("lib/python*/site-packages"))
    backends = _write_backends(situation.folder / "backends", packages / "pytriton" / "tritonserver")
    backend = "aiorch_identity" if situation.workload.onnx is None else "python"
    models = write_repository(situation, backend, signature=True)
    if backend == "python":
        shutil.copy(HERE / "triton" / "model.py", models / situation.workload.model / "1")
    command = [str(packages / "pytriton" / "tritonserver" / "bin" / "tritonserver")]
    command += [f"--model-repository={models}", f"--backend-directory={backends}", "--allow-http=false"]
    command += ["--allow-metrics=false", "--grpc-address=127.0.0.1", f"--grpc-port={situation.port}"]
    if situation.certificate:
        command += ["--grpc-use-ssl=true", f"--grpc-server-cert={situation.certificate.certificate}"]
        command += [f"--grpc-server-key={situation.certificate.key}"]
    libraries = [packages / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR"))]
    return ServerPlan(
        name="triton",
        title="Triton",
        settings=f"Triton 2.51 of nvidia-pytriton {PYTRITON}; identity: native backend in C; others: python backend, "
        "one onnxruntime call per batch; dynamic_batching {}, 1 CPU instance",
        wire=situation.grpc,
        command=command,
        environment={
            "LD_LIBRARY_PATH": os.pathsep.join(str(path) for path in libraries),
            "PATH": os.pathsep.join([str(environment / "bin"), os.environ["PATH"]]),
            "PYTHONPATH": str(packages),
        },
    )


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
        [compiler, *_C_FLAGS, "-o", str(library), str(HERE / "triton" / "identity.c")], check=True, timeout=60
    )
    return folder
