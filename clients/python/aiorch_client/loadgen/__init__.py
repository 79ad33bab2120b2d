"""Load generator for any server of the V2 inference protocol.

``run_load(plan)`` offers pre-serialised requests in a closed loop (channels x streams, each sends its next request
when the last was answered) or an open loop (requests come at times fixed beforehand, whatever the server does).
"""

from aiorch_client.loadgen.arrivals import Arrival, schedule_arrivals
from aiorch_client.loadgen.plan import MODEL_INFER, MODEL_STREAM_INFER, LoadPlan
from aiorch_client.loadgen.result import LOST, WRONG_ANSWER, LoadResult
from aiorch_client.loadgen.run import TargetUnreachable, drive_load, run_load

__all__ = [
    "LOST",
    "MODEL_INFER",
    "MODEL_STREAM_INFER",
    "WRONG_ANSWER",
    "Arrival",
    "LoadPlan",
    "LoadResult",
    "TargetUnreachable",
    "drive_load",
    "run_load",
    "schedule_arrivals",
]
