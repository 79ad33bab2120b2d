"""Logging: one line per record, nothing forged, nothing secret."""

import io
import json
import logging

import pytest

from aiorch_server.observability.logging import configure_logging, mask_secrets

logger = logging.getLogger("aiorch_server.test")


@pytest.fixture
def configured():
    root, talkative = logging.getLogger(), [logging.getLogger(name) for name in ("uvicorn", "alembic")]
    before = root.level, list(root.handlers), [each.level for each in talkative]
    for handler in before[1]:
        root.removeHandler(handler)  # basicConfig(force=True) would close the runner's own

    def configure(**options) -> io.StringIO:
        stream = io.StringIO()
        configure_logging(stream=stream, **options)
        return stream

    yield configure
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.setLevel(before[0])
    for handler in before[1]:
        root.addHandler(handler)
    for each, level in zip(talkative, before[2], strict=True):
        each.setLevel(level)


def test_text(configured):
    stream = configured()
    logger.debug("not shown")
    logger.info("model %s is ready", "digits")
    line = stream.getvalue()
    assert line.endswith("Z INFO    aiorch_server.test: model digits is ready\n") and line.count("\n") == 1


def test_json_lines(configured):
    stream = configured(log_format="json", level="debug")
    try:
        raise ValueError("boom\nline two")
    except ValueError:
        logger.exception("it %s", "failed\nforged")
    logger.debug("漢字")
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.keys() == {"time", "level", "logger", "message", "trace"}
    assert first["message"] == "it failed\nforged" and "ValueError: boom" in first["trace"]
    assert second["message"] == "漢字" and second["level"] == "DEBUG" and second["time"].endswith("Z")


@pytest.mark.parametrize("separator", ["\n", "\r", "\x85", "\u2028", "\x1b[31m", "\x9b31m", "\x00"])
def test_a_name_cannot_forge_a_line(configured, separator):
    stream = configured()
    logger.warning("unknown model '%s'", f"x{separator}2024 ERROR root: forged")
    text = stream.getvalue()
    assert len(text.splitlines()) == 1 and not {"\x1b", "\x9b", "\x00"} & set(text)


def test_the_text_of_an_exception_cannot_forge_a_line(configured):
    stream = configured()
    try:
        raise ValueError("boom\n2024-01-01T00:00:00.000Z ERROR   root: forged\x1b[2J\x9b2J")
    except ValueError:
        logger.exception("it failed")
    first, *rest = stream.getvalue().splitlines()
    assert first.endswith("it failed") and all(line.startswith("    ") for line in rest)
    assert any("forged" in line for line in rest) and not {"\x1b", "\x9b"} & set(stream.getvalue())


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_secrets_are_masked(configured, log_format):
    stream = configured(log_format=log_format)
    logger.info("connecting to postgresql://aiorch:hunter2@db/registry with Authorization: Bearer abc.def")
    try:
        raise RuntimeError("refused: password=hunter2")
    except RuntimeError:
        logger.exception("no")
    assert "hunter2" not in stream.getvalue() and "abc.def" not in stream.getvalue()
    assert "aiorch:***@db/registry" in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("api_key='k-1', next", "api_key='***', next"),
        ("AIORCH_DB_PASSWORD=abc", "AIORCH_DB_PASSWORD=***"),
        ('{"token": "t1", "a": 1}', '{"token": "***", "a": 1}'),
        ("the token bucket is empty", "the token bucket is empty"),
        ("http://127.0.0.1:8000/v2", "http://127.0.0.1:8000/v2"),
    ],
)
def test_what_is_masked_and_what_is_not(text, masked):
    assert mask_secrets(text) == masked


def test_the_web_server_and_the_migrations_are_quiet(configured):
    stream = configured()
    logging.getLogger("uvicorn.error").info("Started server process")
    logging.getLogger("alembic.runtime.migration").info("Will assume transactional DDL.")
    assert stream.getvalue() == ""


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match="unknown log level 'loud'; expected one of"):
        configure_logging("loud")
    with pytest.raises(ValueError, match="unknown log format 'xml'"):
        configure_logging("INFO", "xml")
