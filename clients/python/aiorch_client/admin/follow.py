"""Watching events and waiting for ends, without I/O."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import grpc
from aiorch_proto.admin.v1 import deployments_pb2 as pb

from aiorch_client.admin import deployment_calls
from aiorch_client.admin.calls import AdminLayer
from aiorch_client.admin.deployment_types import Deployment, DeploymentState, Event, Rollout
from aiorch_client.admin.messages import decode_event
from aiorch_client.errors import ClientError, UnavailableError
from aiorch_client.steps import Pause, Steps

WATCH: Final = "Deployments.WatchEvents"
#: ``after`` for events that come from now on.
ONLY_NEW: Final = -1
#: Initial metadata of a watch: the number behind which it begins.
_POSITION_KEY: Final = "aiorch-events-after"
#: Between two looks at a rollout.
LOOK_S: Final = 0.5
#: How long a watch tries to connect anew before it gives up.
PATIENCE_S: Final = 60.0
#: A watch that was open for so long was not a failed attempt, whether it told of an event or not.
HEALTHY_S: Final = 5.0


class Watch:
    """How far somebody has watched, and when to connect again."""

    def __init__(self, layer: AdminLayer, model: str, after: int, patience_s: float) -> None:
        self._layer = layer
        self._model = model
        self._after = after
        self._patience_s = patience_s
        self._attempt = 0
        self._deadline_s = 0.0
        self._healthy_at_s = math.inf

    @property
    def request(self) -> Any:
        """Asks for what was not seen yet."""
        return pb.WatchEventsRequest(model=self._model, after=self._after)

    def begin(self, metadata: Any) -> None:
        """The initial metadata came: a watch from now on has its place from here, before its first event."""
        self._healthy_at_s = self._layer.start_deadline(HEALTHY_S)
        told = next((value for key, value in metadata or () if key == _POSITION_KEY), "")
        if self._after == ONLY_NEW and told.isascii() and told.isdecimal():
            self._after = int(told)

    def take(self, message: Any) -> Event:
        """The event in a message; a later connection begins behind it."""
        self._attempt = 0
        self._after = message.number
        return decode_event(message)

    def pause_s(self, error: ClientError | None) -> float:
        """The seconds to wait after a stream that ended so; raises ``error`` where that does not help."""
        found = error or UnavailableError("the server ended the watch", code=grpc.StatusCode.UNAVAILABLE)
        if self._layer.is_over(self._healthy_at_s):  # it served, though nothing happened: this is a failure of its own
            self._attempt = 0
        self._healthy_at_s = math.inf
        self._attempt += 1
        if self._attempt == 1:
            self._deadline_s = self._layer.start_deadline(self._patience_s)
        pause = None
        if found.code is grpc.StatusCode.UNAVAILABLE:
            pause = self._layer.pause(self._attempt, found, self._deadline_s)
        if pause is None:
            raise found
        return pause.seconds


def wait_rollout(
    layer: AdminLayer, id: str, timeout_s: float, look_s: float, on_look: Callable[[Rollout], object] | None
) -> Steps[Rollout]:
    """Looks until the rollout has ended, or goes on by a person alone."""
    deadline_s = layer.start_deadline(timeout_s)
    while True:
        rollout = yield from layer.call(deployment_calls.get_rollout(id, ""), None)
        if on_look is not None:
            on_look(rollout)
        if rollout.state.is_end or rollout.is_undecided:
            return rollout
        what = f"rollout {id} of model '{rollout.model}' is {rollout.state.value}"
        yield _pause(layer, deadline_s, timeout_s, look_s, what)


def wait_deployment(
    layer: AdminLayer, model: str, timeout_s: float, look_s: float, on_look: Callable[[Deployment], object] | None
) -> Steps[Deployment]:
    """Looks until all servers have done what is wanted, one says that it cannot, or a person has to decide."""
    deadline_s = layer.start_deadline(timeout_s)
    while True:
        deployment = yield from layer.call(deployment_calls.get_deployment(model), None)
        if on_look is not None:
            on_look(deployment)
        rollout = deployment.rollout
        is_undecided = rollout is not None and rollout.is_undecided
        if deployment.state in (DeploymentState.READY, DeploymentState.DEGRADED) or is_undecided:
            return deployment
        what = f"the deployment of model '{model}' is {deployment.state.value} ({deployment.reason})"
        yield _pause(layer, deadline_s, timeout_s, look_s, what)


def _pause(layer: AdminLayer, deadline_s: float, timeout_s: float, look_s: float, what: str) -> Pause:
    if layer.start_deadline(look_s) >= deadline_s:
        text = f"{what}, and has not ended within {timeout_s:g} s"
        raise UnavailableError(text, code=grpc.StatusCode.DEADLINE_EXCEEDED)
    return Pause(look_s)
