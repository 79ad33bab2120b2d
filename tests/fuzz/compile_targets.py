"""The targets, compiled against a build of the core: for libFuzzer, or as the ordinary build is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: The modules by what is in them; all have ``TARGETS``, from names to the addresses of C functions.
MODULES = {
    "session": "fuzz_sessions",
    "frames": "fuzz_sessions",
    "landing": "fuzz_landing",
    "scan": "fuzz_scan",
    "text": "fuzz_text",
    "batch": "fuzz_batch",
    "protobuf": "fuzz_oracle",
    "response": "fuzz_oracle",
}


def compile_targets(place: Path, headers: Path, *, compiler: str = "gcc", flags: str = "") -> None:
    """Leaves the compiled targets in ``place``; what is newer than its source stays."""
    sources = place / "targets"
    sources.mkdir(parents=True, exist_ok=True)
    for source in (HERE / "targets").glob("*.pyx"):
        copy = sources / source.name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            shutil.copyfile(source, copy)
    environment = {**os.environ, "CC": compiler, "LDSHARED": f"{compiler} -shared"}
    environment |= {"AIORCH_FUZZ_FLAGS": flags, "AIORCH_FUZZ_HEADERS": str(headers)}
    environment.pop("LD_PRELOAD", None)  # a sanitizer for the tests is none for the compiler
    command = [sys.executable, str(HERE / "setup.py"), "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the targets do not compile:\n{done.stdout}\n{done.stderr}")
