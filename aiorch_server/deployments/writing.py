"""Writes what a move of a rollout means: its row, the deployment that follows from it, and the event, at one time."""

from __future__ import annotations

from dataclasses import replace

from aiorch_server.deployments.rollout import Move
from aiorch_server.registry.deployments import put_deployment
from aiorch_server.registry.events import append_event
from aiorch_server.registry.records import Deployment, Rollout
from aiorch_server.registry.rollouts import put_rollout
from aiorch_server.registry.session import Session


def write_move(
    session: Session, before: Rollout, move: Move, deployment: Deployment, *, actor: str, is_driver: bool = False
) -> Deployment:
    """Gives the deployment as it is now; nothing is written where nothing moved.

    ``before`` and ``deployment`` were read in this transaction: writers follow each other, so they are still so.
    ``actor`` did it, as the event tells; if that ``is_driver``, the deployment goes on naming who asked for it.
    """
    after = move.rollout
    if after == before:
        return deployment
    put_rollout(session, after)
    wished = follow(deployment, move)
    if wished != deployment:
        asked = deployment.updated_by if is_driver else actor
        deployment = put_deployment(session, wished, actor=asked, expected_generation=deployment.generation)
    if move.text:
        append_event(
            session,
            "rollout.ended" if after.state.is_end else "rollout.step",
            move.text,
            actor=actor,
            model=after.model,
            version=after.to_version,
            rollout=after.id,
        )
    return deployment


def follow(deployment: Deployment, move: Move) -> Deployment:
    """The deployment that a move wants, of the same generation."""
    rollout, wish = move.rollout, move.wish
    version, previous = deployment.version, deployment.previous_version
    left = wish.loaded if rollout.state.is_end else ()
    if left == (rollout.to_version,):
        version, previous = rollout.to_version, rollout.from_version or previous
    elif left == (rollout.from_version,) and version != rollout.from_version:  # it shared with what was tried
        version, previous = rollout.from_version, version or previous
    elif not rollout.from_version:  # nothing else is there to be called the deployed version
        version = rollout.to_version if wish.loaded else 0
    return replace(
        deployment,
        version=version,
        previous_version=previous,
        loaded=wish.loaded,
        traffic=wish.traffic,
        is_sticky=wish.is_sticky,
        shadow=wish.shadow,
        sampled=wish.sampled,
        rollout=rollout.id,
    )
