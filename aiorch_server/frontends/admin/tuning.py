"""Objectives of models, and what the optimizer made of them."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from aiorch_proto.admin.v1 import tuning_pb2 as pb

from aiorch_server.config.objective import Objective
from aiorch_server.errors import NotFoundError
from aiorch_server.frontends.admin.caller import Caller
from aiorch_server.frontends.admin.fields import check_range, choose_paths, within
from aiorch_server.frontends.admin.recording import TrafficRecorder
from aiorch_server.registry import objectives
from aiorch_server.registry.events import append_event

if TYPE_CHECKING:
    from aiorch_server.optimizer.optimizer import Account
    from aiorch_server.registry.session import Session

_LARGEST: Final = float(2**31 - 1)
#: From where to where each field may lie; 0 stands for what is not said.
_BOUNDS: Final = {
    "percentile": (0.0, 100.0),
    "latency_us": (0.0, 3600e6),
    "error_budget": (0.0, 1.0),
    "min_instances": (0.0, 1024.0),
    "max_instances": (0.0, 1024.0),
    "max_batch_size": (0.0, _LARGEST),
    "priority": (-_LARGEST, _LARGEST),
    "instance_cost": (0.0, math.inf),
}


class TuningServicer:
    """The service Tuning: objectives are operations on a session of the registry's database, Explain and
    RecordTraffic are none.
    """

    def __init__(self, explain: Callable[[str], Sequence[Account]], recorder: TrafficRecorder) -> None:
        self._explain = explain
        self._recorder = recorder

    def GetObjective(self, session: Session, request: Any, caller: Caller) -> pb.Objective:
        """What a model should keep to."""
        return _encode(request.model, objectives.get_objective(session, request.model))

    def SetObjective(self, session: Session, request: Any, caller: Caller) -> pb.Objective:
        """Sets the fields that the mask names, and leaves the others as they were."""
        given = request.objective
        paths = choose_paths(request, given, tuple(_BOUNDS))
        for name in paths:
            with within("objective"):
                check_range(getattr(given, name), name, *_BOUNDS[name])
        try:
            before = objectives.get_objective(session, given.model)
        except NotFoundError:
            before = {}
        wanted = {**before, **{name: getattr(given, name) for name in paths}}
        with within("objective"):
            check_range(wanted.get("max_instances", 0) or _LARGEST, "max_instances", wanted.get("min_instances", 0))
        kept = objectives.set_objective(session, given.model, wanted, actor=caller.name)
        if kept != before:
            text = f"the objective of model {given.model} changed: {', '.join(paths)}"
            append_event(session, "objective.set", text, actor=caller.name, model=given.model)
        return _encode(given.model, kept)

    async def Explain(self, request: Any, context: Any) -> pb.Explanation:
        """Where the knobs of the highest tuned version of a model stand, and the last decisions, oldest first."""
        accounts = self._explain(request.model)
        if not accounts:
            raise NotFoundError(
                f"nothing of model {request.model!r} is tuned on this server: it does not serve here, or there is "
                "nothing of it to tune"
            )
        account = max(accounts, key=lambda each: each.version)
        answer = pb.Explanation(
            model=account.model, objective=_write(account.model, account.objective), knobs=account.knobs
        )
        for decision in account.decisions:
            told = answer.decisions.add(
                knob=decision.knob,
                before=decision.before,
                after=decision.after,
                reason=decision.reason,
                effect=decision.effect,
            )
            told.time.FromNanoseconds(int(decision.at_s * 1e9))
        return answer

    async def RecordTraffic(self, request: Any, context: Any) -> AsyncIterator[pb.RecordedTraffic]:
        """When requests come and how many rows they have, while they come."""
        messages = self._recorder.record(request)
        try:
            async for message in messages:
                yield message
        finally:
            await messages.aclose()


def _write(model: str, objective: Objective) -> pb.Objective:
    return pb.Objective(
        model=model,
        percentile=objective.percentile,
        latency_us=objective.latency_us,
        error_budget=objective.allowed_misses,
        min_instances=objective.min_instances,
        max_instances=objective.max_instances,
        max_batch_size=objective.max_batch_size,
        priority=objective.priority,
        instance_cost=objective.cost,
    )


def _encode(model: str, objective: dict[str, Any]) -> pb.Objective:
    return pb.Objective(model=model, **{name: value for name, value in objective.items() if name in _BOUNDS})
