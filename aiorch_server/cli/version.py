"""``aiorch version``."""

from __future__ import annotations

import platform

import grpc
import numpy as np

import aiorch_server
from aiorch_server.cli.connection import Json
from aiorch_server.cli.output import Output


def version(json: Json = False) -> None:
    """Shows the versions of AIOrchestrator and what it stands on."""
    versions = {
        "aiorchestrator": aiorch_server.__version__,
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
        "numpy": np.__version__,
    }
    Output(json).show(versions, "\n".join(f"{name} {number}" for name, number in versions.items()))
