"""Room 4: how a model's configuration becomes a scheduler of the compiled core.

What runs sequences (``sequence``) and ensembles (``ensemble``) is imported with the first of them.
"""

from aiorch_server.scheduling.build import build_scheduler, find_queue_timeout_us
from aiorch_server.scheduling.sequence_plan import read_plan

__all__ = [
    "build_scheduler",
    "find_queue_timeout_us",
    "read_plan",
]
