"""What models should keep to. See models.py for what all of these functions share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from aiorch_server.errors import NotFoundError
from aiorch_server.registry import models
from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.rows import put_row
from aiorch_server.registry.schema import objectives


def get_objective(session: Session, model: str) -> dict[str, Any]:
    """The fields of a model's objective (tuning.proto); NotFoundError for an unknown model, or one without."""
    models.get(session, model)
    found: dict[str, Any] | None = session.execute(
        select(objectives.c.objective).where(objectives.c.model == model)
    ).scalar()
    if found is None:
        raise NotFoundError(f"model {model!r} has no objective")
    return found


def list_objectives(session: Session) -> dict[str, dict[str, Any]]:
    """Those of all models that have one, by model."""
    rows = session.execute(select(objectives.c.model, objectives.c.objective))
    return {model: dict(objective) for model, objective in rows}


def set_objective(session: Session, model: str, objective: Mapping[str, Any], *, actor: str) -> dict[str, Any]:
    """Sets all fields; NotFoundError for an unknown model."""
    models.get(session, model)
    values = {"objective": dict(objective), "updated_at": read_clock(session), "updated_by": actor}
    put_row(session, objectives, {"model": model}, values)
    return get_objective(session, model)
