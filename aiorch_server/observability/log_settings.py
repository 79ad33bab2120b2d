"""Changing what the server writes about itself while it runs, as the logging extension does.

Texts are Triton's (server/docs/protocol/extension_logging.md, server/src/http_server.cc).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from aiorch_server.errors import RequestError, UnsupportedRequest
from aiorch_server.observability.logging import JsonFormatter, LogFormat, TextFormatter

LogValue = bool | int | str
_SWITCHES: Final = {"log_info": logging.INFO, "log_warning": logging.WARNING, "log_error": logging.ERROR}
_FORMATS: Final = ("default", "ISO8601", "text", "json")


class LogSettings:
    """The settings of one output of the standard library's logging, which it changes; may be used on any thread.

    ``log_info``, ``log_warning`` and ``log_error`` switch records of these levels, ``log_verbose_level`` above 0 adds
    debug records. ``log_format`` is "default" (as at the start), "text" or "json"; "ISO8601" means text, which has such
    times always. ``log_file`` is empty, for standard error.
    """

    def __init__(self, output: logging.Handler, level: int, log_format: LogFormat) -> None:
        self._output = output
        self._start_format: LogFormat = log_format
        self._values: dict[str, LogValue] = {
            "log_file": "",
            **{name: level <= number for name, number in _SWITCHES.items()},
            "log_verbose_level": int(level <= logging.DEBUG),
            "log_format": "default",
        }
        output.addFilter(self._is_wanted)

    def values(self) -> dict[str, LogValue]:
        """All settings with Triton's keys."""
        return dict(self._values)

    def update(self, changes: Mapping[str, LogValue | None]) -> dict[str, LogValue]:
        """Changes what is named and not None, and gives all settings.

        RequestError or UnsupportedRequest, and nothing is changed.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        for key, value in given.items():
            _check(key, value)
        self._values |= given
        verbose = int(self._values["log_verbose_level"]) > 0
        enabled = [number for name, number in _SWITCHES.items() if self._values[name]]
        level = logging.DEBUG if verbose else min(enabled, default=logging.CRITICAL + 1)
        log_format = str(self._values["log_format"])
        is_json = (self._start_format if log_format == "default" else log_format) == "json"
        self._output.setFormatter(JsonFormatter() if is_json else TextFormatter())
        logging.getLogger().setLevel(level)
        return self.values()

    def _is_wanted(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.INFO:
            return bool(self._values["log_verbose_level"])
        if record.levelno < logging.WARNING:
            return bool(self._values["log_info"])
        return bool(self._values["log_warning" if record.levelno < logging.ERROR else "log_error"])


def _check(key: str, value: LogValue) -> None:
    if key == "log_file":
        raise UnsupportedRequest("log file location can not be updated through network protocol")
    if key in _SWITCHES:
        if type(value) is not bool:
            raise RequestError(f"expect boolean for '{key}'")
    elif key == "log_verbose_level":
        if type(value) is not int or not 0 <= value < 2**31:
            raise RequestError(f"expect int32 for '{key}'")
    elif key == "log_format":
        if type(value) is not str:
            raise RequestError(f"expect string for '{key}'")
        if value not in _FORMATS:
            raise RequestError(f"invalid argument for log_format, got: {value[:100]}, expected {', '.join(_FORMATS)}")
    else:
        known = ", ".join((*_SWITCHES, "log_verbose_level", "log_format"))
        raise RequestError(f"unknown log setting '{key[:100]}', expected one of {known}")
