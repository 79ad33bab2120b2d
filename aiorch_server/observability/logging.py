"""One place that configures the standard library's logging for the server process."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Literal, TextIO

from aiorch_server.tracing import find_trace

LogFormat = Literal["text", "json"]

_MASK = "***"
#: What must not stand in a log, should a message carry it: ``password=...``, ``Authorization: Bearer ...``,
#: ``scheme://user:password@host``.
_ASSIGNED_SECRET = re.compile(
    r"""(?ix)
    \b ([\w-]*(?:password|passwd|secret|token|api[_-]?key|authorization|credential)s?) (["']?\s*[=:]\s*["']?)
    (?:(?:bearer|basic)\s+)? [^\s,;"'&}]+
    """
)
_URL_SECRET = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/:@]*:)[^\s/@]+@", re.IGNORECASE)
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))} | {
    0x0A: "\\n",
    0x0D: "\\r",
    0x09: "\\t",
}
_CONTROL |= {0x2028: "\\u2028", 0x2029: "\\u2029"}


def configure_logging(
    level: str = "INFO", log_format: LogFormat = "text", stream: TextIO | None = None
) -> tuple[logging.Handler, int]:
    """Sends all records from ``level`` up to ``stream`` (stderr by default) as text or as JSON lines.

    Replaces what was configured before, and gives the output with the level's number. Texts that look like credentials
    are masked. ValueError names an unknown level or format.
    """
    levels = logging.getLevelNamesMapping()
    number = levels.get(level.upper())
    if number is None:
        raise ValueError(
            f"unknown log level '{level}'; expected one of {', '.join(sorted(levels, key=lambda name: levels[name]))}"
        )
    if log_format not in ("text", "json"):
        raise ValueError(f"unknown log format '{log_format}'; expected text or json")
    output = logging.StreamHandler(stream or sys.stderr)
    output.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=number, handlers=[output], force=True)
    # The web server tells about its own start and every bad request; only what goes wrong there is news here.
    # So does what upgrades the registry's tables, in a dozen lines.
    for talkative in ("uvicorn", "alembic"):
        logging.getLogger(talkative).setLevel(max(number, logging.WARNING))
    return output, number


def mask_secrets(text: str) -> str:
    """``text`` with everything masked that looks like a credential."""
    return _URL_SECRET.sub(rf"\1{_MASK}@", _ASSIGNED_SECRET.sub(rf"\1\2{_MASK}", text))


class TextFormatter(logging.Formatter):
    """One line per record (and a traceback's lines, indented): time in UTC, level, logger, message.

    Control characters are escaped: names from requests get into messages and exceptions, and must not forge lines.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as text without a line end."""
        fields = "".join(f" {key}={value}" for key, value in _list_fields(record).items())
        message = (record.getMessage() + fields).translate(_CONTROL)
        text = f"{_show_time(record)} {record.levelname:<7} {record.name}: {message}"
        trace = _show_trace(self, record)
        lines = [text, *(f"    {line.translate(_CONTROL)}" for line in trace.splitlines())]
        return mask_secrets("\n".join(lines))


class JsonFormatter(logging.Formatter):
    """One JSON object per line with the keys time, level, logger, message, and trace where there is a traceback.

    Structured records have more; what belongs to a trace has ``trace_id`` and ``span_id``, of the server or the caller.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of ASCII."""
        document: dict[str, object] = {
            "time": _show_time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": mask_secrets(record.getMessage()),
        }
        fields = _list_fields(record)
        document |= {key: mask_secrets(value) if isinstance(value, str) else value for key, value in fields.items()}
        trace = _show_trace(self, record)
        if trace:
            document["trace"] = mask_secrets(trace)
        return json.dumps(document, separators=(",", ":"))


def _list_fields(record: logging.LogRecord) -> dict[str, object]:
    """What was given as ``extra={"fields": ...}``, and the trace that the task which logs belongs to."""
    fields: dict[str, object] = getattr(record, "fields", {})
    if "trace_id" in fields:
        return fields
    trace = find_trace()
    return fields if trace is None else fields | {"trace_id": trace[:16].hex(), "span_id": trace[16:].hex()}


def _show_time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _show_trace(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = [formatter.formatException(record.exc_info)] if record.exc_info else []
    if record.stack_info:
        parts.append(formatter.formatStack(record.stack_info))
    return "\n".join(parts)
