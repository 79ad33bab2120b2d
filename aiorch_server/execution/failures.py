"""What is told of errors of models: to callers in bounded words, in the log with tracebacks, not too often."""

from __future__ import annotations

import logging
import threading
import time

from aiorch_server.errors import AiorchError, Code

logger = logging.getLogger(__name__)

MAX_ERROR_CHARS = 1000
LOG_INTERVAL_S = 10.0
#: A model may make up a new type of error for each failure; what is remembered of them is bounded.
MAX_ERROR_TYPES = 100


def describe_error(error: BaseException) -> str:
    """Type and text of an error of foreign code, bounded, encodable and without its traceback; never raises."""
    text = read_text(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def read_text(error: BaseException) -> str:
    """The error's own text, bounded and encodable; never raises."""
    try:
        text = str(error)
    except Exception:  # foreign code too
        return ""
    text = text.encode("utf-8", "replace").decode()  # lone surrogates come from undecodable file names
    return text if len(text) <= MAX_ERROR_CHARS else f"{text[:MAX_ERROR_CHARS]}..."


def read_code(error: AiorchError) -> int:
    """GRPC's code; INTERNAL where a model's own class of error has one that there is not."""
    try:
        return int(Code(error.code))
    except ValueError:
        return int(Code.INTERNAL)


class FailureLog:
    """Logs failures of one model with traceback, at most one per type of error and interval; counts the rest."""

    def __init__(self, label: str, interval_s: float = LOG_INTERVAL_S) -> None:
        self._label = label
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._seen: dict[type[BaseException], tuple[float, int]] = {}

    def write(self, error: BaseException) -> None:
        """Logs ``error`` or counts it, when one of its type was logged within the interval."""
        now = time.monotonic()
        with self._lock:
            logged_at, suppressed = self._seen.get(type(error), (-self._interval_s, 0))
            if now - logged_at < self._interval_s:
                self._seen[type(error)] = (logged_at, suppressed + 1)
                return
            if len(self._seen) >= MAX_ERROR_TYPES:
                self._seen.clear()
            self._seen[type(error)] = (now, 0)
        again = f" ({suppressed} more of this type since the last report)" if suppressed else ""
        logger.error("%s: a batch failed%s", self._label, again, exc_info=error)
