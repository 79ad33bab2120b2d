"""What operators ask for: functions over a session of Database.run, each the whole of one change but for its audit.

They write what should run and the events; servers and the driver of rollouts follow what is written. Nothing waits.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from aiorch_server.deployments import rollout as machine
from aiorch_server.deployments.rollout import Command
from aiorch_server.deployments.writing import follow, write_move
from aiorch_server.errors import Conflict, NotFoundError, PreconditionFailed, RequestError
from aiorch_server.registry import deployments, rollouts
from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.events import append_event
from aiorch_server.registry.records import Deployment, ModelVersion, Rollout, RolloutPlan, RolloutState, TrafficTarget
from aiorch_server.registry.session import Session
from aiorch_server.registry.versions import find_version

MAX_INSTANCES: Final = 1024


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an operation left behind; ``deployment`` is None after an undeploy, ``rollout`` the one that it is about.

    ``text`` says in a sentence what was done, or why there was nothing to do; ``has_changed`` tells the two apart.
    """

    deployment: Deployment | None
    rollout: Rollout | None = None
    text: str = ""
    has_changed: bool = True


def deploy(
    session: Session,
    model: str,
    *,
    actor: str,
    version: int = 0,
    alias: str = "",
    plan: RolloutPlan | None = None,
    instances: int = 0,
    expected_generation: int = 0,
    is_on_demand: bool = False,
    allow_code: bool = True,
) -> Outcome:
    """Begins a rollout to a version, which is the latest unless it is named; at once where nothing serves yet.

    ``instances`` 0 leaves them as they are. With ``allow_code`` False a version that can run code is refused.
    What is deployed already is not touched. Raises NotFoundError, UnknownVersion, Conflict for another generation,
    PreconditionFailed while a rollout is under way, or for code.
    """
    found = find_version(session, model, version=version, alias=alias)
    _check_instances(instances)
    present = deployments.find_deployment(session, model)
    _expect(model, present, expected_generation)
    _check_no_rollout(session, model)
    _check_consent(found, allow_code)
    wanted = present or _make_deployment(session, model, actor)
    wanted = replace(wanted, instances=instances or wanted.instances, is_on_demand=is_on_demand)
    if present is not None and present.version == found.version and present.loaded == (found.version,):
        return _change(session, present, wanted, actor, f"version {found.version} of '{model}' is deployed already")
    return _begin(session, present, wanted, found.version, plan or RolloutPlan(), actor, "")


def undeploy(session: Session, model: str, *, actor: str, expected_generation: int = 0) -> Outcome:
    """Takes the model out of service; a rollout that is under way is aborted. NotFoundError, Conflict."""
    present = deployments.get_deployment(session, model)
    _expect(model, present, expected_generation)
    found = rollouts.find_open_rollout(session, model)
    if found is not None:
        reason = f"{actor}: undeploy"
        ended = machine.abandon(found, reason, read_clock(session))
        rollouts.put_rollout(session, ended)
        _tell(session, "rollout.ended", f"rollout {found.id} of '{model}' is aborted: {reason}", actor, ended)
    deployments.withdraw(session, model)
    text = f"'{model}' was taken out of service"
    append_event(session, "deployment.changed", text, actor=actor, model=model, version=present.version)
    return Outcome(None, found, text)


def scale(session: Session, model: str, instances: int, *, actor: str, expected_generation: int = 0) -> Outcome:
    """Changes the number of instances per server, 0: as the configuration says; also during a rollout.

    NotFoundError, Conflict, RequestError for a number that cannot be.
    """
    _check_instances(instances)
    present = deployments.get_deployment(session, model)
    _expect(model, present, expected_generation)
    told = f"{instances} instances" if instances else "as many instances as its configuration says"
    return _change(session, present, replace(present, instances=instances), actor, f"'{model}' has {told} already")


def set_traffic(
    session: Session,
    model: str,
    targets: Sequence[TrafficTarget],
    *,
    actor: str,
    expected_generation: int = 0,
    allow_code: bool = True,
) -> Outcome:
    """Shares by hand, of versions that are loaded for it if need be; versions without a share are not kept.

    With ``allow_code`` False a version that is not loaded yet and can run code is refused, as by ``deploy``.
    NotFoundError, UnknownVersion, Conflict, PreconditionFailed while a rollout is under way, RequestError for shares
    that do not add up.
    """
    present = deployments.get_deployment(session, model)
    _expect(model, present, expected_generation)
    _check_no_rollout(session, model)
    if not targets:
        raise RequestError("no shares are given; they should add up to 100 percent (undeploy takes all away)")
    for version in {each.version for each in targets} - set(present.loaded):
        _check_consent(find_version(session, model, version=version), allow_code)
    wanted = replace(present, traffic=tuple(targets), loaded=tuple(sorted(each.version for each in targets)))
    wanted = replace(wanted, is_sticky=False, shadow=0, sampled=0)
    largest = max(targets, key=lambda each: each.share)
    if all(each.version != present.version or not each.share for each in targets):
        previous = present.version or present.previous_version
        wanted = replace(wanted, version=largest.version, previous_version=previous)
    return _change(session, present, wanted, actor, f"the traffic of '{model}' is shared so already")


def direct(session: Session, model: str, verb: Command, *, actor: str, reason: str = "") -> Outcome:
    """Promote, roll back, pause, resume or abort. Rollback without a rollout deploys the version before, at once.

    NotFoundError, PreconditionFailed where there is nothing to direct, or where it is too late.
    """
    present = deployments.get_deployment(session, model)
    found = rollouts.find_open_rollout(session, model)
    if found is None:
        if verb is Command.ROLLBACK:
            return _go_back(session, present, actor, reason)
        last = rollouts.find_newest_rollout(session, model)
        told = f"; the last one, {last.id}, is {last.state.value}" if last is not None else ""
        raise PreconditionFailed(f"no rollout of '{model}' is under way, there is nothing to {verb.value}{told}")
    move = machine.command(found, verb, read_clock(session), actor=actor, reason=reason)
    if move.rollout == found:
        return Outcome(present, found, f"rollout {found.id} of '{model}' is {found.state.value} already", False)
    now = write_move(session, found, move, present, actor=actor)
    return Outcome(now, rollouts.get_rollout(session, found.id), move.text)


def _go_back(session: Session, present: Deployment, actor: str, reason: str) -> Outcome:
    target = present.previous_version
    if not target or target == present.version:
        raise PreconditionFailed(f"no version of '{present.model}' served before: there is nothing to roll back to")
    return _begin(session, present, present, target, RolloutPlan(), actor, f"{actor}: rollback {reason}".rstrip())


def _begin(
    session: Session,
    present: Deployment | None,
    wanted: Deployment,
    version: int,
    plan: RolloutPlan,
    actor: str,
    reason: str,
) -> Outcome:
    """A rollout to ``version``; with a ``reason`` it goes back to what served before, and waits for nothing."""
    made = Rollout(
        id=secrets.token_hex(8),
        model=wanted.model,
        from_version=_find_stable(wanted, version),
        to_version=version,
        plan=plan,
        state=RolloutState.PENDING,
        began_at=read_clock(session),
        began_by=actor,
        reason=reason,
    )
    move = machine.begin(made, is_urgent=bool(reason) or version in wanted.loaded)
    rollouts.begin_rollout(session, move.rollout)
    generation = present.generation if present is not None else 0
    now = deployments.put_deployment(session, follow(wanted, move), actor=actor, expected_generation=generation)
    _tell(session, "rollout.began", move.text, actor, move.rollout)
    return Outcome(now, move.rollout, move.text)


def _change(session: Session, present: Deployment, wanted: Deployment, actor: str, otherwise: str) -> Outcome:
    """Writes what is wanted if it is not there; ``otherwise`` says that it is."""
    last = rollouts.find_newest_rollout(session, present.model)
    if wanted == present:
        return Outcome(present, last, otherwise, False)
    now = deployments.put_deployment(session, wanted, actor=actor, expected_generation=present.generation)
    text = f"'{now.model}': {_describe(present, now)}"
    append_event(session, "deployment.changed", text, actor=actor, model=now.model, version=now.version)
    return Outcome(now, last, text)


def _describe(before: Deployment, after: Deployment) -> str:
    told = []
    if before.traffic != after.traffic:
        told.append(", ".join(f"{each.share / 100:g} % to version {each.version}" for each in after.traffic))
    if before.instances != after.instances:
        told.append(f"{after.instances or 'configured'} instances per server instead of {before.instances or 'those'}")
    if before.is_on_demand != after.is_on_demand:
        told.append("loaded on demand" if after.is_on_demand else "always loaded")
    return "; ".join(told)


def _find_stable(deployment: Deployment, version: int) -> int:
    """What serves besides ``version``: what it takes over from, 0 if nothing does."""
    serving = [each for each in deployment.traffic if each.share and each.version != version]
    if not serving:
        return 0
    if any(each.version == deployment.version for each in serving):
        return deployment.version
    return max(serving, key=lambda each: each.share).version


def _make_deployment(session: Session, model: str, actor: str) -> Deployment:
    return Deployment(model, 0, 0, read_clock(session), actor)


def _check_no_rollout(session: Session, model: str) -> None:
    found = rollouts.find_open_rollout(session, model)
    if found is not None:
        raise PreconditionFailed(
            f"rollout {found.id} of '{model}' to version {found.to_version} is {found.state.value}, begun by "
            f"{found.began_by} at {found.began_at.isoformat(timespec='seconds')}: promote it, abort it, or wait until "
            "it has ended"
        )


def _check_consent(version: ModelVersion, allow_code: bool) -> None:
    if version.has_code and not allow_code:
        raise PreconditionFailed(
            f"version {version.version} of model '{version.model}' holds artefacts that can run code, which this "
            "server does not allow: start it with --allow-code to trust whoever can upload versions, or upload one "
            "without code"
        )


def _check_instances(instances: int) -> None:
    if not 0 <= instances <= MAX_INSTANCES:
        raise RequestError(f"instances is {instances}; it should be 0 (as configured) to {MAX_INSTANCES}")


def _expect(model: str, present: Deployment | None, generation: int) -> None:
    if not generation or (present is not None and present.generation == generation):
        return
    if present is None:
        raise Conflict(f"'{model}' has no deployment by now, where generation {generation} was expected")
    raise Conflict(
        f"the deployment of '{model}' is at generation {present.generation} by now, not {generation}: "
        f"{present.updated_by} changed it at {present.updated_at.isoformat(timespec='seconds')}"
    )


def _tell(session: Session, kind: str, text: str, actor: str, rollout: Rollout) -> None:
    append_event(session, kind, text, actor=actor, model=rollout.model, version=rollout.to_version, rollout=rollout.id)


def find_rollout(session: Session, *, id: str = "", model: str = "") -> Rollout:
    """By id, or the newest of a model; NotFoundError."""
    if id:
        found = rollouts.get_rollout(session, id)
        if model and found.model != model:
            raise NotFoundError(f"rollout {id} is not of '{model}'")
        return found
    newest = rollouts.find_newest_rollout(session, model)
    if newest is None:
        raise NotFoundError(f"'{model}' has had no rollout")
    return newest
