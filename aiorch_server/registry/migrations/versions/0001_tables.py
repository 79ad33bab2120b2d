"""All tables of the first release."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from aiorch_server.registry.columns import LONG_TEXT, Document, Moment, name_type

revision: Final = "0001"
down_revision: Final = None
branch_labels: Final = None
depends_on: Final = None

_OPTIONS: Final = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4", "mysql_collate": "utf8mb4_bin"}


def _column(name: str, kind: Any, *, nullable: bool = False) -> sa.Column[Any]:
    # Without autoincrement: it would make a number of its own of each lone integer key.
    return sa.Column(name, kind, nullable=nullable, autoincrement=False)


def _text(name: str, length: int = 255, *, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, name_type(length), nullable=nullable)


def _create(name: str, *parts: Any) -> None:
    # MySQL commits each table: after a crash in the middle some are there.
    op.create_table(name, *parts, if_not_exists=True, **_OPTIONS)


def _create_index(name: str, table: str, columns: Sequence[str]) -> None:
    if name not in {each["name"] for each in sa.inspect(op.get_bind()).get_indexes(table)}:
        op.create_index(name, table, columns)


def upgrade() -> None:
    """Makes the tables, and the rows that are always there."""
    _create(
        "api_keys",
        _text("id", 36),
        _text("secret", 64),
        _text("principal"),
        _text("tenant"),
        _column("description", LONG_TEXT),
        _column("created_at", Moment),
        _text("created_by"),
        _column("expires_at", Moment, nullable=True),
        _column("revoked_at", Moment, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
    )
    _create_index("ix_api_keys_principal", "api_keys", ["principal"])
    _create(
        "audit",
        _column("number", sa.BigInteger),
        _column("time", Moment),
        _text("principal"),
        _text("method"),
        _text("model"),
        _text("outcome", 32),
        _column("detail", LONG_TEXT),
        _text("server"),
        _text("hash", 64),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_audit")),
    )
    _create_index("ix_audit_model_number", "audit", ["model", "number"])
    _create_index("ix_audit_principal_number", "audit", ["principal", "number"])
    _create(
        "audit_head",
        _column("id", sa.Integer),
        _column("number", sa.BigInteger),
        _text("hash", 64),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_head")),
    )
    _create(
        "counters",
        _text("name", 32),
        _column("value", sa.BigInteger),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counters")),
    )
    _create(
        "events",
        _column("number", sa.BigInteger),
        _column("time", Moment),
        _text("kind", 64),
        _text("actor"),
        _column("text", LONG_TEXT),
        _text("model"),
        _column("version", sa.BigInteger),
        _text("rollout", 36),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_events")),
    )
    _create_index("ix_events_model_number", "events", ["model", "number"])
    _create(
        "grants",
        _text("id", 36),
        _text("principal"),
        _column("role", sa.Integer),
        _text("models"),
        _column("created_at", Moment),
        _text("created_by"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_grants")),
    )
    _create_index("ix_grants_principal", "grants", ["principal"])
    _create(
        "idempotency",
        _text("id", 64),
        _text("request", 64),
        _column("answer", sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql")),
        _column("expires_at", Moment),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_idempotency")),
    )
    _create_index("ix_idempotency_expires_at", "idempotency", ["expires_at"])
    _create(
        "leases",
        _text("name"),
        _text("holder"),
        _column("epoch", sa.BigInteger),
        _column("expires_at", Moment),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
    )
    _create(
        "manifests",
        _text("digest", 64),
        _column("size_bytes", sa.BigInteger),
        _column("n_files", sa.Integer),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_manifests")),
    )
    _create(
        "models",
        _text("name"),
        _column("description", LONG_TEXT),
        _column("labels", Document),
        _column("revision", sa.BigInteger),
        _column("created_at", Moment),
        _text("created_by"),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_models")),
    )
    _create(
        "numbers",
        _text("model"),
        _column("version", sa.BigInteger),
        _column("generation", sa.BigInteger),
        sa.PrimaryKeyConstraint("model", name=op.f("pk_numbers")),
    )
    _create(
        "objectives",
        _text("model"),
        _column("objective", Document),
        _column("updated_at", Moment),
        _text("updated_by"),
        sa.PrimaryKeyConstraint("model", name=op.f("pk_objectives")),
    )
    _create(
        "quotas",
        _text("tenant"),
        _column("requests_per_s", sa.Double),
        _column("rows_per_s", sa.Double),
        _column("max_in_flight", sa.BigInteger),
        sa.PrimaryKeyConstraint("tenant", name=op.f("pk_quotas")),
    )
    _create(
        "rollouts",
        _text("id", 36),
        _column("number", sa.BigInteger),
        _text("model"),
        _text("open_model", nullable=True),
        _column("from_version", sa.BigInteger),
        _column("to_version", sa.BigInteger),
        _column("plan", Document),
        _text("state", 32),
        _column("reason", LONG_TEXT),
        _column("step", sa.Integer),
        _column("step_began_at", Moment, nullable=True),
        _column("began_at", Moment),
        _text("began_by"),
        _column("ended_at", Moment, nullable=True),
        _column("reports", Document),
        _column("disagreements", Document),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rollouts")),
        sa.UniqueConstraint("number", name=op.f("uq_rollouts_number")),
        sa.UniqueConstraint("open_model", name=op.f("uq_rollouts_open_model")),
    )
    _create_index("ix_rollouts_model_number", "rollouts", ["model", "number"])
    _create(
        "servers",
        _text("name"),
        _column("seen_at", Moment),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_servers")),
    )
    _create(
        "uploads",
        _text("model"),
        _text("upload_id", 128),
        _text("archive_format", 16),
        _column("size_bytes", sa.BigInteger),
        _text("sha256", 64),
        _column("received_bytes", sa.BigInteger),
        _column("version", sa.BigInteger),
        _column("detail", Document),
        _column("created_at", Moment),
        _text("created_by"),
        _column("expires_at", Moment),
        sa.PrimaryKeyConstraint("model", "upload_id", name=op.f("pk_uploads")),
    )
    _create_index("ix_uploads_expires_at", "uploads", ["expires_at"])
    _create(
        "deployments",
        _text("model"),
        _column("generation", sa.BigInteger),
        _column("version", sa.BigInteger),
        _column("previous_version", sa.BigInteger),
        _column("loaded", Document),
        _column("traffic", Document),
        _column("is_sticky", sa.Boolean),
        _column("shadow", sa.BigInteger),
        _column("sampled", sa.Integer),
        _column("instances", sa.Integer),
        _column("is_on_demand", sa.Boolean),
        _text("rollout", 36),
        _column("updated_at", Moment),
        _text("updated_by"),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name=op.f("fk_deployments_models")),
        sa.PrimaryKeyConstraint("model", name=op.f("pk_deployments")),
    )
    _create(
        "manifest_files",
        _text("digest", 64),
        _column("position", sa.Integer),
        _text("path", 1024),
        _column("size_bytes", sa.BigInteger),
        _text("sha256", 64),
        sa.ForeignKeyConstraint(["digest"], ["manifests.digest"], name=op.f("fk_manifest_files_manifests")),
        sa.PrimaryKeyConstraint("digest", "position", name=op.f("pk_manifest_files")),
    )
    _create_index("ix_manifest_files_sha256", "manifest_files", ["sha256"])
    _create(
        "server_statuses",
        _text("server"),
        _text("model"),
        _column("observed_generation", sa.BigInteger),
        _column("versions", Document),
        _column("samples", LONG_TEXT),
        _column("seen_at", Moment),
        sa.ForeignKeyConstraint(["server"], ["servers.name"], name=op.f("fk_server_statuses_servers")),
        sa.PrimaryKeyConstraint("server", "model", name=op.f("pk_server_statuses")),
    )
    _create_index("ix_server_statuses_model", "server_statuses", ["model"])
    _create(
        "versions",
        _text("model"),
        _column("version", sa.BigInteger),
        _text("digest", 64),
        _column("provenance", Document),
        _column("has_code", sa.Boolean),
        _column("created_at", Moment),
        _text("created_by"),
        sa.ForeignKeyConstraint(["digest"], ["manifests.digest"], name=op.f("fk_versions_manifests")),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name=op.f("fk_versions_models")),
        sa.PrimaryKeyConstraint("model", "version", name=op.f("pk_versions")),
    )
    _create_index("ix_versions_digest", "versions", ["digest"])
    _create(
        "aliases",
        _text("model"),
        _text("alias", 63),
        _column("version", sa.BigInteger),
        sa.ForeignKeyConstraint(
            ["model", "version"], ["versions.model", "versions.version"], name=op.f("fk_aliases_versions")
        ),
        sa.PrimaryKeyConstraint("model", "alias", name=op.f("pk_aliases")),
    )
    _create_index("ix_aliases_model_version", "aliases", ["model", "version"])
    counters = sa.table("counters", sa.column("name", sa.String), sa.column("value", sa.BigInteger))
    connection = op.get_bind()
    if connection.execute(sa.select(counters.c.name).where(counters.c.name == "writer")).first() is None:
        connection.execute(sa.insert(counters).values(name="writer", value=0))


def downgrade() -> None:
    """NotImplementedError."""
    raise NotImplementedError("a registry does not go back: restore the backup that was made before the upgrade")
