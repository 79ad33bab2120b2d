"""What should run. See models.py for what all of these functions share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from sqlalchemy import Row, delete, select, update
from sqlalchemy.orm import Session

from aiorch_server.errors import Conflict, NotFoundError, RequestError
from aiorch_server.registry import models
from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.documents import read_traffic, write_record
from aiorch_server.registry.paging import read_page
from aiorch_server.registry.records import Deployment, Page
from aiorch_server.registry.rows import put_row
from aiorch_server.registry.schema import deployments, numbers

WHOLE: Final = 10_000


def find_deployment(session: Session, model: str) -> Deployment | None:
    """The deployment, None where there is none."""
    row = session.execute(select(deployments).where(deployments.c.model == model)).first()
    return None if row is None else _build(row)


def get_deployment(session: Session, model: str) -> Deployment:
    """The deployment; NotFoundError for an unknown model, or one without a deployment."""
    models.get(session, model)
    found = find_deployment(session, model)
    if found is None:
        raise NotFoundError(f"model {model!r} has no deployment")
    return found


def list_deployments(
    session: Session, *, size: int = 0, token: str = "", is_visible: Callable[[str], bool] | None = None
) -> Page[Deployment]:
    """Deployments by model."""
    return read_page(
        session,
        select(deployments),
        deployments.c.model,
        size=size,
        token=token,
        scope=("deployments",),
        build=lambda rows: [_build(row) for row in rows],
        is_wanted=None if is_visible is None else lambda row: is_visible(row.model),
    )


def read_deployments(session: Session) -> tuple[Deployment, ...]:
    """All of them, by model: what a server makes so."""
    return tuple(_build(row) for row in session.execute(select(deployments).order_by(deployments.c.model)))


def put_deployment(session: Session, deployment: Deployment, *, actor: str, expected_generation: int = 0) -> Deployment:
    """Writes what is wanted, with a generation that the model never had before; gives it as it is now.

    ``generation``, ``updated_at`` and ``updated_by`` of what is given do not count. ``expected_generation`` 0 stands
    for any. Raises NotFoundError, UnknownVersion for versions that do not exist, RequestError for shares that are not
    of loaded versions or do not add up, Conflict where the generation is another one by now.
    """
    model = deployment.model
    models.get(session, model)
    _check_generation(session, model, expected_generation)
    _check(session, deployment)
    generation = _count_generation(session, model)
    stamped = replace(deployment, generation=generation, updated_at=read_clock(session), updated_by=actor)
    values = write_record(stamped)
    del values["model"]
    put_row(session, deployments, {"model": model}, values)
    return get_deployment(session, model)


def withdraw(session: Session, model: str, *, expected_generation: int = 0) -> Deployment:
    """Takes a deployment away; gives what it was. NotFoundError, Conflict as for put_deployment."""
    _check_generation(session, model, expected_generation)
    found = get_deployment(session, model)
    _count_generation(session, model)
    session.execute(delete(deployments).where(deployments.c.model == model))
    return found


def _count_generation(session: Session, model: str) -> int:
    generation = session.execute(select(numbers.c.generation).where(numbers.c.model == model)).scalar_one() + 1
    session.execute(update(numbers).where(numbers.c.model == model).values(generation=generation))
    return int(generation)


def _check_generation(session: Session, model: str, expected: int) -> None:
    if not expected:
        return
    found = find_deployment(session, model)
    if found is None:
        raise Conflict(f"model {model!r} has no deployment by now, where generation {expected} was expected")
    if found.generation != expected:
        raise Conflict(
            f"the deployment of model {model!r} is at generation {found.generation} by now, not {expected}: "
            f"{found.updated_by} changed it at {found.updated_at.isoformat(timespec='seconds')}"
        )


def _check(session: Session, deployment: Deployment) -> None:
    wanted = {deployment.version, *deployment.loaded, deployment.shadow} - {0}
    for version in sorted(wanted):
        models.check_version_exists(session, deployment.model, version)
    named = [each.version for each in deployment.traffic]
    if len(set(named)) != len(named):
        raise RequestError("a version has two shares of the traffic; one is enough")
    if not set(named) <= set(deployment.loaded):
        raise RequestError("a share of the traffic goes to a version that is not to be loaded")
    if deployment.traffic and sum(each.share for each in deployment.traffic) != WHOLE:
        raise RequestError("the shares of the traffic must add up to 100 percent")
    if any(not 0 <= each.share <= WHOLE for each in deployment.traffic) or not 0 <= deployment.sampled <= WHOLE:
        raise RequestError("shares are between 0 and 100 percent")
    if not 0 <= deployment.instances < 2**31:
        raise RequestError(f"found {deployment.instances} instances; it should be 0 or more")


def _build(row: Row[Any]) -> Deployment:
    values = dict(row._mapping)
    return Deployment(**{**values, "loaded": tuple(row.loaded), "traffic": read_traffic(row.traffic)})
