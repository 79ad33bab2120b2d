"""What a figure was measured on; stored beside every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("numpy", "onnxruntime", "grpcio", "protobuf", "uvloop", "Cython")


def describe_machine() -> dict[str, Any]:
    """CPU, cores, kernel, versions, commit, date and load average as JSON-ready values; no host name, no paths."""
    memory = psutil.virtual_memory()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _read_cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory_gib": round(memory.total / 2**30, 1),
        "kernel": platform.release(),
        "system": _read_os_name(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _find_version(name))},
        "commit": _ask_git("rev-parse", "--short=12", "HEAD"),
        "has_uncommitted_changes": bool(_ask_git("status", "--porcelain", "--untracked-files=no")),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def _read_cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _read_os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _ask_git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
