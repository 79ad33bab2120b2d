"""What the migrations make is what the code expects, also when two servers start at once or one died in between."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from databases import new_database
from sqlalchemy import create_engine, select, text

from aiorch_server.errors import PreconditionFailed, RegistryUnavailable
from aiorch_server.registry import models, upgrade
from aiorch_server.registry.database import Database
from aiorch_server.registry.schema import counters, metadata
from aiorch_server.registry.upgrade import SchemaState, check_schema, upgrade_schema
from aiorch_server.registry.urls import DatabaseUrl

SCRIPTS = Path(upgrade.__file__).parent / "migrations"


def scripts() -> Config:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    return config


def test_the_list_of_migrations_is_the_one_there_is() -> None:
    directory = ScriptDirectory.from_config(scripts())
    assert tuple(each.revision for each in reversed(list(directory.walk_revisions()))) == upgrade.REVISIONS


def test_migrations_make_exactly_the_schema(empty_url: str) -> None:
    assert check_schema(empty_url).state is SchemaState.EMPTY
    assert upgrade_schema(empty_url).state is SchemaState.EMPTY
    assert check_schema(empty_url).state is SchemaState.CURRENT
    assert upgrade_schema(empty_url).state is SchemaState.CURRENT
    engine = create_engine(DatabaseUrl(empty_url).full)
    with engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts={**options, "target_metadata": metadata})
        assert compare_metadata(context, metadata) == []
        assert connection.execute(select(counters)).all() == [("writer", 0)]
    engine.dispose()


def test_what_the_schema_has_and_the_database_lacks_is_found(url: str) -> None:
    engine = create_engine(DatabaseUrl(url).full)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE models DROP COLUMN description"))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata)
    engine.dispose()


def test_two_servers_that_start_at_once(empty_url: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(upgrade_schema, [empty_url] * 4))
    assert SchemaState.EMPTY in {each.state for each in found}
    assert check_schema(empty_url).state is SchemaState.CURRENT


def test_a_server_that_died_in_the_middle_of_the_first_migration(tmp_path: Path) -> None:
    url = new_database("mariadb", tmp_path)  # the others undo what they had begun
    upgrade_schema(url)
    engine = create_engine(DatabaseUrl(url).full)
    with engine.begin() as connection:
        for statement in ("DELETE FROM alembic_version", "DROP TABLE aliases, versions", "DELETE FROM counters"):
            connection.execute(text(statement))
        connection.execute(text("DROP INDEX ix_events_model_number ON events"))
    assert check_schema(url).state is SchemaState.EMPTY
    upgrade_schema(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.execute(select(counters)).all() == [("writer", 0)]
    engine.dispose()


def test_tables_of_a_newer_version_are_left_alone(url: str) -> None:
    engine = create_engine(DatabaseUrl(url).full)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    assert check_schema(url).state is SchemaState.NEWER
    with pytest.raises(PreconditionFailed, match="at 9999, this version knows 0001: run a newer version"):
        upgrade_schema(url)
    engine.dispose()


def test_there_is_no_way_back(url: str) -> None:
    engine = create_engine(DatabaseUrl(url).full)
    config = scripts()
    with engine.begin() as connection, pytest.raises(NotImplementedError, match="restore the backup"):
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    engine.dispose()


def test_a_database_without_tables_says_what_to_do(empty_url: str) -> None:
    database = Database(empty_url)
    for run in (database.run_blocking, database.read_blocking):
        with pytest.raises(RegistryUnavailable, match="has no tables: run `aiorch registry upgrade`"):
            run(lambda session: models.get(session, "digits"))
    database.close()
