"""Builds of the core for sanitizers and fuzzers, each in a place of its own beside the normal one."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("aiorch_server", "backends", "clients", "proto")
SOURCES = (".py", ".pyi", ".pyx", ".pxd", ".h", ".typed")
PATHS = (".", "backends", "clients/python", "proto")


def build(kind: str, *, compiler: str = "gcc", flags: str = "") -> Path:
    """Copies the sources to ``.cache/instrumented/KIND`` and compiles there what has changed; gives that folder.

    ``kind`` is a value of ``AIORCH_SANITIZE``, ``flags`` are more for the compiler. CalledProcessError if it fails.
    """
    place = ROOT / ".cache" / "instrumented" / kind
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one build at a time
        _build(place, kind, compiler, flags)
    return place


def _build(place: Path, kind: str, compiler: str, flags: str) -> None:
    wanted = [ROOT / name for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE")]
    for package in PACKAGES:
        wanted += [path for path in (ROOT / package).rglob("*") if path.suffix in SOURCES and path.is_file()]
    targets = {place / path.relative_to(ROOT): path for path in wanted}
    for target, source in targets.items():
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.name == "setup.py":  # other flags: all of it anew
                for compiled in place.rglob("*.so"):
                    compiled.unlink(missing_ok=True)
            shutil.copyfile(source, target)  # with the time of now: what is older than its build is not compiled
    for old in [path for package in PACKAGES for path in (place / package).rglob("*") if path.suffix in SOURCES]:
        if old not in targets:  # a module that is no more
            built = old.parent.glob(f"{old.stem}.*") if old.suffix == ".pyx" else ()
            for left in (old, *(path for path in built if path.suffix in (".c", ".so"))):
                left.unlink()
    environment = {**os.environ, "AIORCH_SANITIZE": kind, "AIORCH_DEBUG": "1", "CC": compiler}
    environment |= {"LDSHARED": f"{compiler} -shared", "CFLAGS": flags}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=place, env=environment, check=True)


def find_library(name: str, *, compiler: str = "gcc") -> str:
    """The path of a library that comes with the compiler; FileNotFoundError if it does not."""
    found = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        raise FileNotFoundError(f"{compiler} has no {name}")
    return str(path.resolve())


def make_python_path(place: Path, *others: Path) -> str:
    """A PYTHONPATH under which the packages come from `place`."""
    return os.pathsep.join(str(path) for path in (*others, *((place / part).resolve() for part in PATHS)))
