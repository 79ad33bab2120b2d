"""Pure decisions about versions: which ones should be served, and the one thing to do next to get there.

The shape (aspired versions in, at most one next action out, no state of its own) is that of TensorFlow Serving's
``AspiredVersionPolicy``; the rule is its availability-preserving one: what serves stays until something aspired serves.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from aiorch_server.config.placement import VersionPolicy
from aiorch_server.types import ModelState

#: A version, or a version with its fingerprint: then a changed artefact is one more thing to load before the swap.
Key = TypeVar("Key", int, tuple[int, str])


class Verb(enum.Enum):
    """What to do with a version."""

    LOAD = "load"
    UNLOAD = "unload"


@dataclass(frozen=True, slots=True)
class Action(Generic[Key]):
    """One step: load or unload ``key``."""

    verb: Verb
    key: Key


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a version stands. ``has_failed`` marks one whose load failed: it is not tried again while it is there."""

    state: ModelState
    has_failed: bool = False


def choose_aspired(policy: VersionPolicy | None, versions: Iterable[int]) -> tuple[int, ...]:
    """The versions that should be served, out of those that are there, highest first; no policy means the latest."""
    present = sorted(set(versions), reverse=True)
    if policy is None:
        return tuple(present[:1])
    if policy.all is not None:
        return tuple(present)
    if policy.specific is not None:
        wanted = set(policy.specific.versions)
        return tuple(version for version in present if version in wanted)
    count = policy.latest.num_versions if policy.latest is not None else 1
    return tuple(present[:count])


def find_missing(policy: VersionPolicy | None, versions: Iterable[int]) -> tuple[int, ...]:
    """The versions that a ``specific`` policy names but that are not there, lowest first."""
    if policy is None or policy.specific is None:
        return ()
    return tuple(sorted(set(policy.specific.versions) - set(versions)))


def choose_action(standings: Mapping[Key, Standing], aspired: Collection[Key]) -> Action[Key] | None:
    """The next step from ``standings`` towards serving exactly ``aspired``, or None if there is none now.

    Contract: depends on its arguments alone, so it may be asked again at any time. A version that is LOADING or
    UNLOADING is left alone: the answer is then about the others. Keys that are not in ``standings`` were never loaded.

    1. A version that is not aspired goes once an aspired one is READY, or nothing is aspired. Lowest first. (Before
       loading, so that no more versions than needed are in memory at once.)
    2. An aspired version that does not serve, and did not fail, is loaded. Highest first.

    So a failed load leaves what served before, and the last READY version is never taken away for one that is not.
    """
    ready = {key for key, standing in standings.items() if standing.state is ModelState.READY}
    if not aspired or ready.intersection(aspired):
        surplus = ready.difference(aspired)
        if surplus:
            return Action(Verb.UNLOAD, min(surplus))
    missing = [key for key in aspired if _is_loadable(standings.get(key))]
    return Action(Verb.LOAD, max(missing)) if missing else None


def _is_loadable(standing: Standing | None) -> bool:
    if standing is None:
        return True
    return standing.state in (ModelState.UNKNOWN, ModelState.UNAVAILABLE) and not standing.has_failed
