"""Where a model comes from, as far as its files tell."""

from __future__ import annotations

import subprocess
from pathlib import Path, PurePosixPath
from typing import Final

from aiorch_client.admin.archive import Archive

_FRAMEWORKS: Final = {
    ".onnx": "onnxruntime",
    ".pt2": "pytorch",
    ".pt": "pytorch",
    ".savedmodel": "tensorflow",
    ".keras": "tensorflow",
    ".skops": "sklearn",
    ".joblib": "sklearn",
    ".pkl": "sklearn",
    ".py": "python",
}
_GIT_LIMIT_S: Final = 10.0


def guess_framework(archive: Archive) -> str:
    """The backend whose artefact is in the archive (``model.onnx``, ``1/model.onnx``), empty where that is not one."""
    found = set()
    for name in archive.names:
        parts = PurePosixPath(name).parts
        artefact = PurePosixPath(parts[1] if parts[0].isdecimal() and len(parts) > 1 else parts[0])
        if artefact.stem == "model" and artefact.suffix in _FRAMEWORKS:
            found.add(_FRAMEWORKS[artefact.suffix])
    return found.pop() if len(found) == 1 else ""


def find_git_commit(path: Path) -> str:
    """The commit of the checkout that ``path`` is in, with ``-dirty`` where files differ from it; empty without one."""
    folder = path if path.is_dir() else path.parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
