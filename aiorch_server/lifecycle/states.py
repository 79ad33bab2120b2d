"""The life of a model version, as a table; what is not in the table is a fault of this server.

::

    UNKNOWN -> LOADING -> READY -> UNLOADING -> UNAVAILABLE
                  |  ^                              |
                  |  `------------------------------'
                  `-> UNAVAILABLE
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from aiorch_server.errors import InternalError
from aiorch_server.types import ModelState

#: Every legal step of a model version, with what it means.
TRANSITIONS: Mapping[tuple[ModelState, ModelState], str] = MappingProxyType(
    {
        (ModelState.UNKNOWN, ModelState.LOADING): "the version is wanted for the first time",
        (ModelState.LOADING, ModelState.READY): "all instances are loaded and warm, requests are taken",
        (ModelState.LOADING, ModelState.UNAVAILABLE): "the load failed, was abandoned or was refused",
        (ModelState.READY, ModelState.UNLOADING): "no new requests are taken, those under way are finished",
        (ModelState.UNLOADING, ModelState.UNAVAILABLE): "all instances are gone",
        (ModelState.UNAVAILABLE, ModelState.LOADING): "the version is wanted again",
    }
)


def explain_transition(current: ModelState, following: ModelState) -> str:
    """What the step from ``current`` to ``following`` means; InternalError if the table does not hold it."""
    try:
        return TRANSITIONS[current, following]
    except KeyError:
        legal = sorted(after.value for before, after in TRANSITIONS if before is current)
        raise InternalError(
            f"a model version cannot go from {current.value} to {following.value}; from {current.value} it can go to "
            f"{', '.join(legal) or 'nothing'}"
        ) from None
