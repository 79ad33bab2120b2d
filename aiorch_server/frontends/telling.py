"""What callers are told of an error, and what the operator's log is."""

from __future__ import annotations

import logging
import time
from typing import Final

from aiorch_server.errors import AiorchError

logger = logging.getLogger(__name__)

#: How often the same text is logged, and how many texts are remembered for that.
_PAUSE_S: Final = 10.0
_MAX_TEXTS: Final = 100
_logged_at: Final[dict[str, float]] = {}


def tell(error: AiorchError) -> str:
    """The text for the caller; what it leaves out is logged, the same at most once in ten seconds."""
    if not error.told:
        return str(error)
    text, now_s = str(error), time.monotonic()
    if now_s - _logged_at.get(text, -_PAUSE_S) >= _PAUSE_S:
        if len(_logged_at) >= _MAX_TEXTS:
            _logged_at.clear()
        _logged_at[text] = now_s
        logger.warning("callers are told that %s; %s", error.told, text)
    return error.told
