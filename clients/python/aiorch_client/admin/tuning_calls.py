"""The calls of the service Tuning."""

from __future__ import annotations

from typing import Any, Final

from aiorch_proto.admin.v1 import tuning_pb2 as pb

from aiorch_client.admin.calls import Call
from aiorch_client.admin.messages import decode_explanation, decode_objective
from aiorch_client.admin.tuning_types import Explanation, Objective, RecordedTraffic
from aiorch_client.errors import RequestError

RECORD: Final = "Tuning.RecordTraffic"


def get_objective(model: str) -> Call[Objective]:
    """What a model should keep to."""
    return Call("Tuning.GetObjective", pb.GetObjectiveRequest(model=model), decode_objective)


def set_objective(model: str, **fields: float | int | None) -> Call[Objective]:
    """Changes the fields that are not None; RequestError where all are, or one is too large for its field."""
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    if not given:
        raise RequestError(f"nothing to set: give one of {', '.join(fields)}")
    try:
        request = pb.SetObjectiveRequest(objective=pb.Objective(model=model, **given))
    except (TypeError, ValueError) as error:
        raise RequestError(f"the objective of model '{model}' cannot be sent: {error}") from None
    request.update_mask.paths.extend(given)
    return Call("Tuning.SetObjective", request, decode_objective)


def explain(model: str) -> Call[Explanation]:
    """Why the knobs stand where they stand."""
    return Call("Tuning.Explain", pb.ExplainRequest(model=model), decode_explanation)


def record_traffic(model: str, seconds: float, version: int) -> pb.RecordTrafficRequest:
    """Asks ``RECORD`` for so long; RequestError for what cannot be sent."""
    try:
        request = pb.RecordTrafficRequest(model=model, version=version)
        request.duration.FromNanoseconds(round(seconds * 1e9))
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"{seconds} s of model '{model}' cannot be asked for: {error}") from None
    return request


def decode_traffic(message: pb.RecordedTraffic) -> RecordedTraffic:
    """One message of a recording."""
    return RecordedTraffic(message.version, tuple(message.times_ns), tuple(message.rows), message.lost)
