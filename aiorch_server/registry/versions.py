"""Versions of models, and the lists of their files. See models.py for what all of these functions share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.orm import Session

from aiorch_server.errors import PreconditionFailed, RequestError, UnknownVersion
from aiorch_server.registry import models
from aiorch_server.registry.clock import read_clock
from aiorch_server.registry.documents import read_provenance, write_record
from aiorch_server.registry.names import check_labels, check_number, check_sha256, check_text
from aiorch_server.registry.paging import read_page
from aiorch_server.registry.records import ArtefactFile, Manifest, ModelVersion, Page, Provenance
from aiorch_server.registry.rows import put_row
from aiorch_server.registry.schema import (
    aliases,
    deployments,
    manifest_files,
    manifests,
    numbers,
    rollouts,
    uploads,
    versions,
)

_MAX_FILES: Final = 100_000
_MAX_ITEMS: Final = 1000
#: Values that one statement may name.
_CHUNK: Final = 500


def add_version(
    session: Session,
    model: str,
    manifest: Manifest,
    provenance: Provenance,
    *,
    actor: str,
    has_code: bool = False,
    create_model: bool = False,
    point_aliases: Iterable[str] = (),
) -> ModelVersion:
    """Gives ``manifest`` the model's next number, which was never given before, and points aliases at it.

    Its blobs are in the store already. Raises NotFoundError for an unknown model unless ``create_model``,
    RequestError for what cannot be kept.
    """
    check_provenance(provenance)
    if create_model and not models.has(session, model):
        models.register(session, model, actor=actor)
    models.get(session, model)
    _keep_manifest(session, manifest)
    version = session.execute(select(numbers.c.version).where(numbers.c.model == model)).scalar_one() + 1
    session.execute(update(numbers).where(numbers.c.model == model).values(version=version))
    row = {
        "model": model,
        "version": version,
        "digest": manifest.digest,
        "provenance": write_record(provenance),
        "has_code": has_code,
        "created_at": read_clock(session),
        "created_by": actor,
    }
    session.execute(insert(versions).values(row))
    for alias in point_aliases:
        models.set_alias(session, model, alias, version)
    models.touch(session, model)
    return get_version(session, model, version)


def check_provenance(provenance: Provenance) -> None:
    """RequestError for what cannot be kept; for callers that want to know before bytes come."""
    check_labels(provenance.labels)
    check_text(provenance.description, "description")
    for name in ("framework", "framework_version", "data_hash", "git_commit"):
        check_text(getattr(provenance, name), name, 1024)
    if max(len(provenance.metrics), len(provenance.inputs), len(provenance.outputs)) > _MAX_ITEMS:
        raise RequestError(f"at most {_MAX_ITEMS} metrics, inputs and outputs are kept")
    for name, value in provenance.metrics.items():
        check_text(name, "the name of a metric", 255)
        if not math.isfinite(value):
            raise RequestError(f"metric {name!r} is {value}; it should be a finite number")
    for tensor in (*provenance.inputs, *provenance.outputs):
        check_text(tensor.name + tensor.datatype, "the name of a tensor", 1024)


def get_version(session: Session, model: str, version: int) -> ModelVersion:
    """The version with its files; NotFoundError, UnknownVersion."""
    models.get(session, model)
    check_number(version, "a version")
    query = _select_versions().where(versions.c.model == model, versions.c.version == version)
    row = session.execute(query).first()
    if row is None:
        raise UnknownVersion(f"model {model!r} has no version {version}")
    return _build(session, [row])[0]


def find_version(session: Session, model: str, *, version: int = 0, alias: str = "") -> ModelVersion:
    """The version that is meant, as models.resolve_version says."""
    return get_version(session, model, models.resolve_version(session, model, version=version, alias=alias))


def list_versions(session: Session, model: str, *, size: int = 0, token: str = "") -> Page[ModelVersion]:
    """Versions with their files, the highest first; NotFoundError."""
    models.get(session, model)
    return read_page(
        session,
        _select_versions().where(versions.c.model == model),
        versions.c.version,
        size=size,
        token=token,
        scope=("versions", model),
        build=lambda rows: _build(session, rows),
        weigh=lambda row: row.n_files,
        is_descending=True,
    )


def delete_version(session: Session, model: str, version: int) -> None:
    """Takes a version away; its blobs are left to collect.py.

    Raises NotFoundError, UnknownVersion, PreconditionFailed while an alias, a deployment or a rollout uses it.
    """
    found = get_version(session, model, version)
    if found.aliases:
        names = ", ".join(found.aliases)
        raise PreconditionFailed(f"alias {names} of model {model!r} points at version {version}: point it elsewhere")
    deployment = session.execute(select(deployments).where(deployments.c.model == model)).first()
    if deployment is not None and version in (deployment.version, deployment.shadow, *deployment.loaded):
        raise PreconditionFailed(f"the deployment of model {model!r} uses version {version}")
    if deployment is not None and version == deployment.previous_version:
        raise PreconditionFailed(f"version {version} is what a rollback of model {model!r} goes back to")
    ways = select(rollouts.c.id, rollouts.c.from_version, rollouts.c.to_version).where(rollouts.c.open_model == model)
    for way in session.execute(ways):
        if version in (way.from_version, way.to_version):
            raise PreconditionFailed(f"rollout {way.id} of model {model!r} uses version {version}")
    session.execute(delete(versions).where(versions.c.model == model, versions.c.version == version))
    session.execute(delete(uploads).where(uploads.c.model == model, uploads.c.version == version))
    if session.execute(select(versions.c.model).where(versions.c.digest == found.manifest.digest)).first() is None:
        for table in (manifest_files, manifests):
            session.execute(delete(table).where(table.c.digest == found.manifest.digest))
    models.touch(session, model)


def find_referenced(session: Session, blobs: Collection[str]) -> frozenset[str]:
    """Those of these blobs (SHA-256 in hex) that some version is made of."""
    ordered, found = sorted(blobs), set[str]()
    for begin in range(0, len(ordered), _CHUNK):
        part = ordered[begin : begin + _CHUNK]
        query = select(manifest_files.c.sha256).where(manifest_files.c.sha256.in_(part)).distinct()
        found.update(session.execute(query).scalars())
    return frozenset(found)


def read_referenced(session: Session, *, after: str = "", limit: int = 5000) -> tuple[str, ...]:
    """Blobs that versions are made of, in their order, behind ``after``; empty behind the last."""
    query = select(manifest_files.c.sha256).where(manifest_files.c.sha256 > after).distinct()
    return tuple(session.execute(query.order_by(manifest_files.c.sha256).limit(limit)).scalars())


def _select_versions() -> Any:
    return select(versions, manifests.c.n_files).join(manifests, manifests.c.digest == versions.c.digest)


def _keep_manifest(session: Session, manifest: Manifest) -> None:
    check_sha256(manifest.digest, "a manifest's digest")
    if not 0 < len(manifest.files) <= _MAX_FILES:
        raise RequestError(f"a version has 1 to {_MAX_FILES} files, found {len(manifest.files)}")
    for file in manifest.files:
        check_text(file.path, "a path", 1024)
        check_sha256(file.sha256, f"the digest of {file.path!r}")
    if session.execute(select(manifests.c.digest).where(manifests.c.digest == manifest.digest)).first() is not None:
        return
    values = {"size_bytes": manifest.size_bytes, "n_files": len(manifest.files)}
    put_row(session, manifests, {"digest": manifest.digest}, values)
    session.execute(
        insert(manifest_files),
        [
            {"digest": manifest.digest, "position": position, **write_record(file)}
            for position, file in enumerate(manifest.files)
        ],
    )


def _build(session: Session, rows: Sequence[Row[Any]]) -> list[ModelVersion]:
    digests = sorted({row.digest for row in rows})
    files: dict[str, list[ArtefactFile]] = {digest: [] for digest in digests}
    for begin in range(0, len(digests), _CHUNK):
        query = (
            select(manifest_files)
            .where(manifest_files.c.digest.in_(digests[begin : begin + _CHUNK]))
            .order_by(manifest_files.c.digest, manifest_files.c.position)
        )
        for file in session.execute(query):
            files[file.digest].append(ArtefactFile(file.path, file.size_bytes, file.sha256))
    pointing: dict[tuple[str, int], list[str]] = {}
    names = sorted({row.model for row in rows})
    for row in session.execute(select(aliases).where(aliases.c.model.in_(names)).order_by(aliases.c.alias)):
        pointing.setdefault((row.model, row.version), []).append(row.alias)
    return [
        ModelVersion(
            model=row.model,
            version=row.version,
            manifest=Manifest(row.digest, tuple(files[row.digest])),
            provenance=read_provenance(row.provenance),
            created_at=row.created_at,
            created_by=row.created_by,
            has_code=row.has_code,
            aliases=tuple(pointing.get((row.model, row.version), ())),
        )
        for row in rows
    ]


def count_versions(session: Session, model: str) -> int:
    """How many versions a model has."""
    return session.execute(select(func.count()).where(versions.c.model == model)).scalar_one()
