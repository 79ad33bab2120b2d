"""Generates proto/aiorch_proto/<package> from proto/aiorch/<package>/*.proto, for each package.

    python proto/generate.py            # writes
    python proto/generate.py --check    # writes nothing; exit status 1 if the checked-in files are not current

The generated modules live in the package ``aiorch_proto``, not in ``aiorch`` as protoc would have it, so imports and
module names inside them are rewritten. No ``*_pb2_grpc.py`` is made: its stubs would call the path of our own package
and pin a version of grpcio; ``service.py`` of each package holds the served paths instead.

protoc must stay at 31.x (grpcio-tools 1.76 to 1.78): code it generates loads with protobuf 6.31 and all of 7, so that
this package and tritonclient, which wants protobuf below 7, fit in one environment.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
#: The .proto files of each package.
SOURCES = {
    "v2": ("aiorch/v2/model_config.proto", "aiorch/v2/inference.proto"),
    "tfserving": (
        "aiorch/tfserving/core.proto",
        "aiorch/tfserving/error.proto",
        "aiorch/tfserving/serving.proto",
    ),
    "admin/v1": tuple(
        f"aiorch/admin/v1/{name}.proto" for name in ("registry", "deployments", "tuning", "access", "audit")
    ),
}
PACKAGE = ROOT / "aiorch_proto" / "v2"
#: The "gencode" version that protoc stamps into what it generates.
GENCODE_VERSION = "6.31.1"
#: What protoc writes for ``aiorch.<package>``, in imports and as names of modules.
_REWRITES = (
    (re.compile(r"^from aiorch\.([\w.]+) import ", re.MULTILINE), r"from aiorch_proto.\1 import "),
    (re.compile(r"'aiorch\.([\w.]+_pb2)'"), r"'aiorch_proto.\1'"),
)


def generate(package: str = "v2") -> dict[str, str]:
    """The text of each generated file of ``package`` by its name; RuntimeError if protoc fails or is another."""
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: protoc brings its own copy of protobuf's C++ code, which does not get along with
        # that of a framework loaded beside it.
        command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={ROOT}", f"--python_out={folder}"]
        if subprocess.run([*command, f"--pyi_out={folder}", *SOURCES[package]]).returncode != 0:
            raise RuntimeError("protoc failed; what it printed above says where")
        files = {path.name: rewrite(path.read_text("utf-8")) for path in Path(folder).rglob("*_pb2.py*")}
    for name, text in files.items():
        if name.endswith(".py") and f"# Protobuf Python Version: {GENCODE_VERSION}\n" not in text:
            raise RuntimeError(f"{name} is not of version {GENCODE_VERSION}: install grpcio-tools>=1.76,<1.79")
    return files


def rewrite(text: str) -> str:
    """Generated text with the imports and module names of the package in which it is installed."""
    for old, new in _REWRITES:
        text = old.sub(new, text)
    return text


def find_drift(files: dict[str, str], package: Path = PACKAGE) -> list[str]:
    """One sentence for each generated file of ``package`` that is missing, differs or has no source any more."""
    drift = []
    for name, text in sorted(files.items()):
        path = package / name
        if not path.exists():
            drift.append(f"{name} is missing")
        elif path.read_text("utf-8") != text:
            drift.append(f"{name} differs from what its .proto file gives")
    known = {path.name for path in package.glob("*_pb2.py*")}
    return drift + [f"{name} has no .proto file" for name in sorted(known - files.keys())]


def main() -> int:
    """The command; gives its exit status."""
    parser = argparse.ArgumentParser(description="Generates proto/aiorch_proto from proto/aiorch/*/*.proto.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the checked-in files drifted")
    is_check: bool = parser.parse_args().check
    has_drift = False
    for package in SOURCES:
        folder = PACKAGE.parent / package
        files = generate(package)
        drift = find_drift(files, folder)
        if not is_check:
            for path in folder.glob("*_pb2.py*"):
                if path.name not in files:
                    path.unlink()
            for name, text in files.items():
                (folder / name).write_text(text, "utf-8")
        for sentence in drift:
            sys.stdout.write(f"{package}/{sentence}" + (": run proto/generate.py\n" if is_check else ": written\n"))
        has_drift = has_drift or bool(drift)
    return 1 if has_drift and is_check else 0


if __name__ == "__main__":
    sys.exit(main())
