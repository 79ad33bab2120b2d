"""The signals that end a server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def catching_signals(asked: asyncio.Event) -> Iterator[None]:
    """Sets ``asked`` at the first signal; ends the process at the second. Off the main thread, catches nothing."""
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if asked.is_set():
            logger.warning("%s again: ending at once", number.name)
            os._exit(128 + number)
        logger.info("%s: draining", number.name)
        asked.set()

    caught = []
    try:
        for number in SIGNALS:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, on_signal, number)
                caught.append(number)
        yield
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
