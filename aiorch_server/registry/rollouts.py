"""Ways from one version to another; one of a model is under way at most. See models.py for what all functions share."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Row, delete, select, update
from sqlalchemy.orm import Session

from aiorch_server.errors import NotFoundError, PreconditionFailed
from aiorch_server.registry.documents import read_plan, read_reports, write_record
from aiorch_server.registry.names import show
from aiorch_server.registry.paging import read_page
from aiorch_server.registry.records import Page, Rollout, RolloutState
from aiorch_server.registry.rows import count_up, put_row
from aiorch_server.registry.schema import rollouts

COUNTER: Final = "rollout"
#: Ended ones of a model that are kept.
KEPT: Final = 1000


def begin_rollout(session: Session, rollout: Rollout) -> Rollout:
    """Writes a new rollout down; PreconditionFailed while another of the model is under way, which it names."""
    other = find_open_rollout(session, rollout.model)
    if other is not None:
        raise PreconditionFailed(
            f"rollout {other.id} of model {rollout.model!r} to version {other.to_version} is {other.state}, "
            f"begun by {other.began_by} at {other.began_at.isoformat(timespec='seconds')}: "
            "promote it, abort it, or wait until it has ended"
        )
    values = {**_write(rollout), "number": count_up(session, COUNTER)}
    put_row(session, rollouts, {"id": rollout.id}, values)
    return get_rollout(session, rollout.id)


def put_rollout(session: Session, rollout: Rollout) -> Rollout:
    """Writes what became of a rollout; NotFoundError, PreconditionFailed for one that has ended before."""
    found = get_rollout(session, rollout.id)
    if found.state.is_end:
        raise PreconditionFailed(f"rollout {found.id} has ended: it is {found.state}")
    session.execute(update(rollouts).where(rollouts.c.id == rollout.id).values(_write(rollout)))
    return get_rollout(session, rollout.id)


def get_rollout(session: Session, id: str) -> Rollout:
    """The rollout of that id; NotFoundError."""
    row = session.execute(select(rollouts).where(rollouts.c.id == id)).first()
    if row is None:
        raise NotFoundError(f"there is no rollout {show(id)}")
    return _build(row)


def find_open_rollout(session: Session, model: str) -> Rollout | None:
    """The one of a model that is under way, if any is."""
    row = session.execute(select(rollouts).where(rollouts.c.open_model == model)).first()
    return None if row is None else _build(row)


def find_newest_rollout(session: Session, model: str) -> Rollout | None:
    """The one of a model that began last, if there was any."""
    query = select(rollouts).where(rollouts.c.model == model).order_by(rollouts.c.number.desc()).limit(1)
    row = session.execute(query).first()
    return None if row is None else _build(row)


def read_open_rollouts(session: Session) -> tuple[Rollout, ...]:
    """All that are under way, the oldest first."""
    query = select(rollouts).where(rollouts.c.open_model.is_not(None)).order_by(rollouts.c.number)
    return tuple(_build(row) for row in session.execute(query))


def list_rollouts(session: Session, model: str, *, size: int = 0, token: str = "") -> Page[Rollout]:
    """Those of a model, the newest first."""
    return read_page(
        session,
        select(rollouts).where(rollouts.c.model == model),
        rollouts.c.number,
        size=size,
        token=token,
        scope=("rollouts", model),
        build=lambda rows: [_build(row) for row in rows],
        is_descending=True,
    )


def forget_rollouts(session: Session, model: str, *, kept: int = KEPT) -> int:
    """Takes away a model's ended rollouts but for the last ones; gives how many."""
    query = select(rollouts.c.number).where(rollouts.c.model == model).order_by(rollouts.c.number.desc())
    oldest = session.execute(query.offset(kept).limit(1)).scalar()
    if oldest is None:
        return 0
    old = (rollouts.c.model == model, rollouts.c.number <= oldest, rollouts.c.open_model.is_(None))
    return session.execute(delete(rollouts).where(*old)).rowcount  # type: ignore[attr-defined,no-any-return]


def _write(rollout: Rollout) -> dict[str, Any]:
    values = write_record(rollout)
    del values["id"]
    return {**values, "state": rollout.state.value, "open_model": None if rollout.state.is_end else rollout.model}


def _build(row: Row[Any]) -> Rollout:
    values = dict(row._mapping)
    del values["number"], values["open_model"]
    parts = {
        "plan": read_plan(row.plan),
        "state": RolloutState(row.state),
        "reports": read_reports(row.reports),
        "disagreements": tuple(row.disagreements),
    }
    return Rollout(**{**values, **parts})
