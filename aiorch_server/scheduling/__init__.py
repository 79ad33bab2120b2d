"""Room 4: how a model's configuration becomes a scheduler of the compiled core."""

from aiorch_server.scheduling.build import build_scheduler

__all__ = ["build_scheduler"]
