"""Run by Alembic: migrates over the connection that upgrade.py opened, within its transaction."""

from __future__ import annotations

from alembic import context

from aiorch_server.registry.schema import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, transactional_ddl=connection.dialect.name != "mysql")
with context.begin_transaction():
    context.run_migrations()
