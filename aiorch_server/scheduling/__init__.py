"""Room 4: how a model's configuration becomes a scheduler of the compiled core."""

from aiorch_server.scheduling.build import build_scheduler, find_queue_timeout_us
from aiorch_server.scheduling.sequence import SequenceScheduler, build_sequence_schedulers
from aiorch_server.scheduling.sequence_plan import read_plan

__all__ = [
    "SequenceScheduler",
    "build_scheduler",
    "build_sequence_schedulers",
    "find_queue_timeout_us",
    "read_plan",
]
