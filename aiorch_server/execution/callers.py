"""Who asks: the models whose code waits for a request, so that calls between models neither ring nor run too deep."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final, NamedTuple, Protocol

from aiorch_server.errors import RequestError

#: Models that may call each other for one request.
MAX_DEPTH: Final = 16


class Holding(Protocol):
    """What an instance holds of resources that models share, while it runs."""

    def explain_conflict(self, model: str, held: Sequence[Holding]) -> str:
        """Why ``model`` cannot run before all of ``held`` is given back; "" if it can."""
        ...


class _Thread(threading.local):
    holding: Holding | None = None


#: What the instance whose thread this is holds now.
this_thread: Final = _Thread()


class Caller(NamedTuple):
    """A model whose code called another; ``is_waiting``: its instance does nothing else until the answer is there.

    ``holding`` is what that instance holds meanwhile.
    """

    model: str
    is_waiting: bool
    holding: Holding | None = None


#: Outermost first.
Callers = tuple[Caller, ...]

#: Those of the task that runs now; whatever it queues, itself or through an ensemble, takes them along.
current_callers: ContextVar[Callers] = ContextVar("current_callers", default=())


def check_callers(model: str, instances: int) -> None:
    """RequestError where a request of this task to ``model`` is too deep, or would wait for what waits for it.

    That is instances, of which the model has ``instances``: if as many wait in this one chain of calls, none is left;
    and resources that the chain holds.
    """
    callers = current_callers.get()
    if not callers:
        return
    path = " -> ".join([*(caller.model for caller in callers), model])
    if len(callers) > MAX_DEPTH:
        raise RequestError(f"calls between models are more than {MAX_DEPTH} deep: {path}")
    n_waiting = sum(caller.model == model and caller.is_waiting for caller in callers)
    if n_waiting >= max(1, instances):
        text = "its only instance waits" if instances <= 1 else f"all of its {instances} instances wait"
        raise RequestError(f"model '{model}' cannot be called by a call of its own, {path}: {text} for that call")
    held = [caller.holding for caller in callers if caller.holding is not None]
    if held and (reason := held[0].explain_conflict(model, held)):
        raise RequestError(f"model '{model}' cannot be called here, {path}: {reason}")
