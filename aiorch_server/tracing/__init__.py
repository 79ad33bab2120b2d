"""What is watched of one request on the control plane: who sent it, and the models that it ran through."""

from aiorch_server.tracing.incoming import (
    ROUTE_KEY,
    TIMING_HEADER,
    Incoming,
    current_incoming,
    find_trace,
    receive,
    speak_of,
)
from aiorch_server.tracing.run import CacheHit, Run, current_run

__all__ = [
    "ROUTE_KEY",
    "TIMING_HEADER",
    "CacheHit",
    "Incoming",
    "Run",
    "current_incoming",
    "current_run",
    "find_trace",
    "receive",
    "speak_of",
]
