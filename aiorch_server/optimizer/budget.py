"""Who may have one more instance where the machine has not room for all: by priority. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """What one version has, from how many to how many it may have, and whether it misses its objective."""

    priority: int
    instances: int
    fewest: int
    most: int
    is_short: bool


@dataclass(frozen=True, slots=True)
class Shares:
    """How many instances each may have, and the places of who gives one up and of who gets it, if any does."""

    limits: tuple[int, ...]
    giver: int | None = None
    taker: int | None = None


def share_instances(claims: Sequence[Claim], budget: int) -> Shares:
    """All together have ``budget`` at most, but each as many as it must have, and nobody loses what it has for less.

    What is free is for the most important one that misses its objective; for anybody where nobody does. Where nothing
    is free, the least important one that has more than it must have gives an instance up, if it is less important.
    """
    free = max(0, budget - sum(claim.instances for claim in claims))
    short = [at for at, claim in enumerate(claims) if claim.is_short and claim.instances < claim.most]
    if not short:
        return Shares(tuple(min(claim.most, claim.instances + free) for claim in claims))
    taker = max(short, key=lambda at: (claims[at].priority, -claims[at].instances))
    limits = [claim.instances for claim in claims]
    limits[taker] = min(claims[taker].most, limits[taker] + free)
    if free:
        return Shares(tuple(limits))
    givers = [
        at
        for at, claim in enumerate(claims)
        if claim.instances > claim.fewest and claim.priority < claims[taker].priority
    ]
    giver = min(givers, key=lambda at: (claims[at].priority, -claims[at].instances), default=None)
    return Shares(tuple(limits), giver, taker if giver is not None else None)
