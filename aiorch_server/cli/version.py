"""``aiorch version``."""

from __future__ import annotations

import platform
from importlib.metadata import version as find_version

import numpy as np

import aiorch_server
from aiorch_server.cli.output import Json, Output


def version(json: Json = False) -> None:
    """Shows the versions of AIOrchestrator and what it stands on."""
    versions = {
        "aiorchestrator": aiorch_server.__version__,
        "python": platform.python_version(),
        "grpcio": find_version("grpcio"),
        "numpy": np.__version__,
    }
    Output(json).show(versions, "\n".join(f"{name} {number}" for name, number in versions.items()))
