"""The registry's tables. What changes here needs a migration, and is tested against it.

All writers of one database follow each other (database.py), so that no function needs locks of its own.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    UniqueConstraint,
)
from sqlalchemy.dialects import mysql

from aiorch_server.registry.columns import LONG_TEXT, Document, Moment, name_type

#: Each row is bytes, not letters: MariaDB would find Digits where digits is asked for.
TABLE_OPTIONS: Final[dict[str, Any]] = {
    "mysql_engine": "InnoDB",
    "mysql_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_bin",
}
metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)
_SHA256 = 64


def _table(name: str, *parts: Any) -> Table:
    return Table(name, metadata, *parts, **TABLE_OPTIONS)


def _text(name: str, length: int = 255, **options: Any) -> Column[str]:
    return Column(name, name_type(length), nullable=options.pop("nullable", False), **options)


def _whole(name: str, **options: Any) -> Column[int]:
    return Column(name, BigInteger, nullable=False, autoincrement=False, **options)


def _moment(name: str, *, nullable: bool = False) -> Column[Any]:
    return Column(name, Moment, nullable=nullable)


def _document(name: str) -> Column[Any]:
    return Column(name, Document, nullable=False)


#: Numbers that only grow. The row "writer" is the lock that all writers take first.
counters = _table("counters", _text("name", 32, primary_key=True), _whole("value"))

models = _table(
    "models",
    _text("name", primary_key=True),
    Column("description", LONG_TEXT, nullable=False),
    _document("labels"),
    _whole("revision"),
    _moment("created_at"),
    _text("created_by"),
)
#: The highest numbers that were given to a name; outlives the model, so that none is given twice.
numbers = _table(
    "numbers",
    _text("model", primary_key=True),
    _whole("version"),
    _whole("generation"),
)
#: Lists of files by their digest; versions with the same content share one.
manifests = _table(
    "manifests",
    Column("digest", name_type(_SHA256), primary_key=True),
    _whole("size_bytes"),
    Column("n_files", Integer, nullable=False),
)
manifest_files = _table(
    "manifest_files",
    Column("digest", name_type(_SHA256), ForeignKey("manifests.digest"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    _text("path", 1024),
    _whole("size_bytes"),
    Column("sha256", name_type(_SHA256), nullable=False),
    Index("ix_manifest_files_sha256", "sha256"),
)
versions = _table(
    "versions",
    _text("model", primary_key=True),
    _whole("version", primary_key=True),
    Column("digest", name_type(_SHA256), ForeignKey("manifests.digest"), nullable=False),
    _document("provenance"),
    Column("has_code", Boolean, nullable=False),
    _moment("created_at"),
    _text("created_by"),
    ForeignKeyConstraint(["model"], ["models.name"]),
    Index("ix_versions_digest", "digest"),
)
aliases = _table(
    "aliases",
    _text("model", primary_key=True),
    _text("alias", 63, primary_key=True),
    _whole("version"),
    ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.version"]),
    Index("ix_aliases_model_version", "model", "version"),
)
#: Uploads under way, and what became of those that are done; the bytes are in the store.
uploads = _table(
    "uploads",
    _text("model", primary_key=True),
    _text("upload_id", 128, primary_key=True),
    _text("archive_format", 16),
    _whole("size_bytes"),
    Column("sha256", name_type(_SHA256), nullable=False),
    _whole("received_bytes"),
    _whole("version"),
    _document("detail"),
    _moment("created_at"),
    _text("created_by"),
    _moment("expires_at"),
    Index("ix_uploads_expires_at", "expires_at"),
)
deployments = _table(
    "deployments",
    _text("model", primary_key=True),
    _whole("generation"),
    _whole("version"),
    _whole("previous_version"),
    _document("loaded"),
    _document("traffic"),
    Column("is_sticky", Boolean, nullable=False),
    _whole("shadow"),
    Column("sampled", Integer, nullable=False),
    Column("instances", Integer, nullable=False),
    Column("is_on_demand", Boolean, nullable=False),
    _text("rollout", 36),
    _moment("updated_at"),
    _text("updated_by"),
    ForeignKeyConstraint(["model"], ["models.name"]),
)
#: `open_model` is the model's name until the rollout has ended: so there is one under way at most.
rollouts = _table(
    "rollouts",
    _text("id", 36, primary_key=True),
    _whole("number"),
    _text("model"),
    _text("open_model", nullable=True),
    _whole("from_version"),
    _whole("to_version"),
    _document("plan"),
    _text("state", 32),
    Column("reason", LONG_TEXT, nullable=False),
    Column("step", Integer, nullable=False),
    _moment("step_began_at", nullable=True),
    _moment("began_at"),
    _text("began_by"),
    _moment("ended_at", nullable=True),
    _document("reports"),
    _document("disagreements"),
    UniqueConstraint("open_model"),
    UniqueConstraint("number"),
    Index("ix_rollouts_model_number", "model", "number"),
)
#: Servers that have been heard of, and what each made of each deployment.
servers = _table(
    "servers",
    _text("name", primary_key=True),
    _moment("seen_at"),
)
server_statuses = _table(
    "server_statuses",
    _text("server", primary_key=True),
    _text("model", primary_key=True),
    _whole("observed_generation"),
    _document("versions"),
    Column("samples", LONG_TEXT, nullable=False),
    _moment("seen_at"),
    ForeignKeyConstraint(["server"], ["servers.name"]),
    Index("ix_server_statuses_model", "model"),
)
#: `epoch` grows each time that a lease changes hands.
leases = _table(
    "leases",
    _text("name", primary_key=True),
    _text("holder"),
    _whole("epoch"),
    _moment("expires_at"),
)
events = _table(
    "events",
    _whole("number", primary_key=True),
    _moment("time"),
    _text("kind", 64),
    _text("actor"),
    Column("text", LONG_TEXT, nullable=False),
    _text("model"),
    _whole("version"),
    _text("rollout", 36),
    Index("ix_events_model_number", "model", "number"),
)
#: Answers to repeat, by SHA-256 of caller and key.
idempotency = _table(
    "idempotency",
    Column("id", name_type(_SHA256), primary_key=True),
    Column("request", name_type(_SHA256), nullable=False),
    Column("answer", LargeBinary().with_variant(mysql.LONGBLOB(), "mysql"), nullable=False),
    _moment("expires_at"),
    Index("ix_idempotency_expires_at", "expires_at"),
)
audit = _table(
    "audit",
    _whole("number", primary_key=True),
    _moment("time"),
    _text("principal"),
    _text("method"),
    _text("model"),
    _text("outcome", 32),
    Column("detail", LONG_TEXT, nullable=False),
    _text("server"),
    Column("hash", name_type(_SHA256), nullable=False),
    Index("ix_audit_principal_number", "principal", "number"),
    Index("ix_audit_model_number", "model", "number"),
)
#: The last entry of the audit log, in one row.
audit_head = _table(
    "audit_head",
    Column("id", Integer, primary_key=True, autoincrement=False),
    _whole("number"),
    Column("hash", name_type(_SHA256), nullable=False),
)
grants = _table(
    "grants",
    _text("id", 36, primary_key=True),
    _text("principal"),
    Column("role", Integer, nullable=False),
    _text("models"),
    _moment("created_at"),
    _text("created_by"),
    Index("ix_grants_principal", "principal"),
)
#: `secret` is a digest of the key's secret part.
api_keys = _table(
    "api_keys",
    _text("id", 36, primary_key=True),
    Column("secret", name_type(_SHA256), nullable=False),
    _text("principal"),
    _text("tenant"),
    Column("description", LONG_TEXT, nullable=False),
    _moment("created_at"),
    _text("created_by"),
    _moment("expires_at", nullable=True),
    _moment("revoked_at", nullable=True),
    Index("ix_api_keys_principal", "principal"),
)
quotas = _table(
    "quotas",
    _text("tenant", primary_key=True),
    Column("requests_per_s", Double, nullable=False),
    Column("rows_per_s", Double, nullable=False),
    _whole("max_in_flight"),
)
#: What models should keep to; the optimizer says what is in them.
objectives = _table(
    "objectives",
    _text("model", primary_key=True),
    _document("objective"),
    _moment("updated_at"),
    _text("updated_by"),
)
