"""Registered models and their aliases.

As all of these modules: functions over a session of Database.run or read; they tell nobody, so that whoever calls them
writes the event and the audit entry in the same transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Row, delete, exists, func, insert, select, update
from sqlalchemy.orm import Session

from aiorch_server.errors import (
    AlreadyExists,
    Conflict,
    NotFoundError,
    PreconditionFailed,
    RequestError,
    UnknownVersion,
)
from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.names import (
    check_alias,
    check_labels,
    check_model_name,
    check_text,
    is_model_name,
    not_registered,
)
from aiorch_server.registry.paging import read_page
from aiorch_server.registry.records import Model, Page
from aiorch_server.registry.rows import put_row
from aiorch_server.registry.schema import aliases, deployments, models, numbers, objectives, uploads, versions


def register(
    session: Session, name: str, *, actor: str, description: str = "", labels: Mapping[str, str] | None = None
) -> Model:
    """Makes a model that has no versions; AlreadyExists where the name is taken, RequestError for a wrong name."""
    check_model_name(name)
    if has(session, name):
        raise AlreadyExists(f"model {name!r} is registered already")
    row = {
        "name": name,
        "description": check_text(description, "description"),
        "labels": check_labels(labels or {}),
        "revision": 1,
        "created_at": read_clock(session),
        "created_by": actor,
    }
    session.execute(insert(models).values(row))
    if session.execute(select(numbers.c.model).where(numbers.c.model == name)).first() is None:
        session.execute(insert(numbers).values(model=name, version=0, generation=0))
    return get(session, name)


def has(session: Session, name: str) -> bool:
    """Whether there is such a model."""
    if not is_model_name(name):  # not asked for: MariaDB takes "digits " for "digits", PostgreSQL no NUL
        return False
    return session.execute(select(models.c.name).where(models.c.name == name)).first() is not None


def get(session: Session, name: str) -> Model:
    """The model; NotFoundError."""
    row = session.execute(select(models).where(models.c.name == name)).first() if is_model_name(name) else None
    if row is None:
        raise not_registered(name)
    return _build(session, [row])[0]


def update_model(
    session: Session, name: str, *, description: str | None = None, labels: Mapping[str, str] | None = None
) -> Model:
    """Changes what is given; NotFoundError."""
    values: dict[str, Any] = {}
    if description is not None:
        values["description"] = check_text(description, "description")
    if labels is not None:
        values["labels"] = check_labels(labels)
    if values:
        session.execute(update(models).where(models.c.name == name).values(values))
        touch(session, name)
    return get(session, name)


def list_models(
    session: Session,
    *,
    size: int = 0,
    token: str = "",
    name_prefix: str = "",
    is_visible: Callable[[str], bool] | None = None,
) -> Page[Model]:
    """Models by name: those that begin with ``name_prefix`` and are visible."""
    query = select(models)
    if name_prefix and not is_model_name(name_prefix):
        return Page(())
    if name_prefix:
        # Not LIKE, in which characters have meanings, and which SQLite takes for the same in both cases.
        query = query.where(func.substr(models.c.name, 1, len(name_prefix)) == name_prefix)
    return read_page(
        session,
        query,
        models.c.name,
        size=size,
        token=token,
        scope=("models", name_prefix),
        build=lambda rows: _build(session, rows),
        is_wanted=None if is_visible is None else lambda row: is_visible(row.name),
    )


def delete_model(session: Session, name: str) -> None:
    """Takes a model away for good; NotFoundError, PreconditionFailed while it has versions or a deployment."""
    get(session, name)
    n_versions = session.execute(select(func.count()).where(versions.c.model == name)).scalar_one()
    if n_versions:
        raise PreconditionFailed(f"model {name!r} has {n_versions} versions: delete them first")
    if session.execute(select(deployments.c.model).where(deployments.c.model == name)).first() is not None:
        raise PreconditionFailed(f"model {name!r} has a deployment: undeploy it first")
    for table in (uploads, objectives):
        session.execute(delete(table).where(table.c.model == name))
    session.execute(delete(models).where(models.c.name == name))


def set_alias(session: Session, name: str, alias: str, version: int, *, expected_version: int = 0) -> Model:
    """Points an alias at a version, 0: takes it away.

    Raises NotFoundError, UnknownVersion, and Conflict where ``expected_version`` is not 0 and it does not point there.
    """
    check_alias(alias)
    model = get(session, name)
    found = model.aliases.get(alias, 0)
    if expected_version and found != expected_version:
        where = f"points at version {found}" if found else "does not exist"
        raise Conflict(f"alias {alias!r} of model {name!r} {where} by now, not at version {expected_version}")
    if version == found:
        return model
    if version == 0:
        session.execute(delete(aliases).where(aliases.c.model == name, aliases.c.alias == alias))
    else:
        check_version_exists(session, name, version)
        put_row(session, aliases, {"model": name, "alias": alias}, {"version": version})
    touch(session, name)
    return get(session, name)


def resolve_version(session: Session, name: str, *, version: int = 0, alias: str = "") -> int:
    """The number of the version that is meant: by number, by alias, or the latest.

    Raises NotFoundError, UnknownVersion, and RequestError for both at a time.
    """
    model = get(session, name)
    if version and alias:
        raise RequestError("name a version by its number or by an alias, not by both")
    if alias:
        found = model.aliases.get(check_alias(alias))
        if found is None:
            raise NotFoundError(f"model {name!r} has no alias {alias!r}")
        return found
    if version:
        return check_version_exists(session, name, version)
    if not model.latest_version:
        raise UnknownVersion(f"model {name!r} has no versions")
    return model.latest_version


def check_version_exists(session: Session, name: str, version: int) -> int:
    """Gives the version back; UnknownVersion."""
    if not session.execute(select(exists().where(versions.c.model == name, versions.c.version == version))).scalar():
        raise UnknownVersion(f"model {name!r} has no version {version}")
    return version


def touch(session: Session, name: str) -> None:
    """The model's etag is another from now on."""
    session.execute(update(models).where(models.c.name == name).values(revision=models.c.revision + 1))


def _build(session: Session, rows: Sequence[Row[Any]]) -> list[Model]:
    names = [row.name for row in rows]
    latest = dict(
        session.execute(
            select(versions.c.model, func.max(versions.c.version))
            .where(versions.c.model.in_(names))
            .group_by(versions.c.model)
        )
        .tuples()
        .all()
    )
    pointing: dict[str, dict[str, int]] = {}
    for row in session.execute(select(aliases).where(aliases.c.model.in_(names)).order_by(aliases.c.alias)):
        pointing.setdefault(row.model, {})[row.alias] = row.version
    return [
        Model(
            name=row.name,
            created_at=row.created_at,
            created_by=row.created_by,
            description=row.description,
            labels=row.labels,
            aliases=pointing.get(row.name, {}),
            latest_version=latest.get(row.name, 0),
            etag=f"{int(row.created_at.timestamp() * 1e6):x}-{row.revision}",
        )
        for row in rows
    ]
