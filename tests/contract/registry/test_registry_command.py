"""``aiorch registry upgrade`` and ``check``; and passwords, which nobody sees."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path
from urllib.parse import quote

import pytest
from databases import PASSWORD, new_database, shared_server

from aiorch_server.cli.output import UsageError
from aiorch_server.cli.settings import build_config
from aiorch_server.config.load import load_server_config
from aiorch_server.config.server import ServerConfig
from aiorch_server.errors import InvalidSettings, RegistryUnavailable
from aiorch_server.registry import models
from aiorch_server.registry.database import Database
from aiorch_server.registry.upgrade import upgrade_schema
from aiorch_server.registry.urls import DatabaseUrl

SECRET = "sEcr3t-w0rd"
URLS = [
    f"postgresql://aiorch:{SECRET}@127.0.0.1:1/registry",
    f"mysql://aiorch:{SECRET}@127.0.0.1:1/registry",
    f"postgresql://aiorch@127.0.0.1:1/registry?password={SECRET}&sslpassword={SECRET}",
]


def aiorch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aiorch_server.cli", "registry", *arguments],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip


def test_from_nothing_to_this_version(tmp_path: Path) -> None:
    url = new_database("postgresql", tmp_path)
    looked = aiorch("check", "--registry", url)
    assert (looked.returncode, looked.stdout) == (1, "empty: at empty, this version needs 0001\n"), looked.stderr
    done = aiorch("upgrade", AIORCH_REGISTRY=url)
    assert (done.returncode, done.stdout) == (0, "upgraded from empty to 0001\n"), done.stderr
    looked = aiorch("check", "--json", "--registry", url)
    assert looked.returncode == 0
    assert json.loads(looked.stdout) == {"state": "current", "revision": "0001", "head": "0001"}


def test_exit_codes() -> None:
    nothing = aiorch("check")
    assert nothing.returncode == 2 and "no registry is given: add --registry URL" in nothing.stderr
    away = aiorch("upgrade", "--registry", URLS[0])
    assert away.returncode == 3 and "cannot be used" in away.stderr
    assert SECRET not in away.stderr + away.stdout


@pytest.mark.parametrize("url", URLS)
def test_a_password_is_in_no_error(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    database = Database(url, timeout_s=1.0)
    for do in (lambda: database.run_blocking(print), lambda: upgrade_schema(url)):
        with pytest.raises(RegistryUnavailable) as caught:
            do()
        assert SECRET not in "".join(traceback.format_exception(caught.value))
    shown = f"{database!r} {database.url} {database.url!r} {caplog.text}"
    assert SECRET not in shown and "127.0.0.1:1/registry" in shown
    database.close()


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_wrong_password(kind: str) -> None:
    url = shared_server(kind).create().replace(quote(PASSWORD, safe=""), SECRET)
    database = Database(url)
    with pytest.raises(
        RegistryUnavailable, match=r"cannot be used.*(password authentication failed|Access denied)"
    ) as caught:
        database.read_blocking(models.list_models)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    database.close()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        (f"postgresql://aiorch:pass@{SECRET}@db/x", "cannot be read"),
        (f"postgresql://aiorch:p@{SECRET}:{SECRET}/x", "cannot be read"),
        (f"{SECRET}", "cannot be read"),
        (f"oracle://aiorch:{SECRET}@db/x", "should begin with one of sqlite, postgresql, mysql, mariadb"),
        (f"postgresql+asyncpg://aiorch:{SECRET}@db/x", "should begin with one of"),
        (f"postgresql://aiorch:{SECRET}@db", "must name a database"),
        ("sqlite://", "must name a database, for SQLite a file"),
        ("sqlite:///:memory:", "must name a database, for SQLite a file"),
    ],
)
def test_urls_that_cannot_be(url: str, text: str) -> None:
    with pytest.raises(InvalidSettings, match=text) as caught:
        DatabaseUrl(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("url", [f"oracle://u:{SECRET}@h/d", SECRET, "sqlite://"])
def test_a_setting_that_cannot_be_is_not_shown(url: str) -> None:
    with pytest.raises(InvalidSettings, match=r"registry\.url: should be a URL that begins with one of") as caught:
        load_server_config({"registry": url}, environment={})
    assert SECRET not in str(caught.value)


def test_a_setting_is_not_shown(tmp_path: Path) -> None:
    config = load_server_config({"registry": URLS[0]}, environment={})
    assert config.registry.is_enabled and SECRET not in repr(config)
    assert not ServerConfig().registry.is_enabled
    with pytest.raises(InvalidSettings, match="should be text") as caught:
        load_server_config({"registry_url": 4711}, environment={})
    assert "4711" not in str(caught.value)
    options = {"registry": URLS[0], "model_repository": [str(tmp_path)]}
    given = {"file": None, "use_ssl": None, "log_verbose": None, "backend_config": []}
    with pytest.raises(UsageError, match="given twice") as told:
        build_config(options, **given, others=[f"registry.url={URLS[1]}"])
    assert SECRET not in str(told.value)


@pytest.mark.parametrize("artefacts", ["s3://", "ftp://host/x", "s3://-"])
def test_stores_that_cannot_be(artefacts: str) -> None:
    with pytest.raises(InvalidSettings, match=r"registry\.artefacts: should be a folder or s3://BUCKET/PREFIX"):
        load_server_config({"artefacts": artefacts}, environment={})


def test_the_log_tells_which_file_the_registry_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert DatabaseUrl("sqlite:///aiorch.db").place == str(tmp_path / "aiorch.db")
    assert DatabaseUrl(URLS[0]).file is None
    assert DatabaseUrl(URLS[0]).place == "postgresql://aiorch:***@127.0.0.1:1/registry"
