"""Keeps a few real requests of a model in memory, to warm the next version with."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from aiorch_server.errors import AiorchError
from aiorch_server.routing import Replay, Sample
from aiorch_server.types import InferenceRequest

logger = logging.getLogger(__name__)

MOST_REQUESTS: Final = 8
#: Larger requests are not kept.
MOST_BYTES: Final = 1 << 20
#: All of them together may take so long on a new version.
PATIENCE_S: Final = 10.0
#: A model that answers nothing for so long is idle.
IDLE_S: Final = 0.1
#: How long a rollout waits at most for something to warm with.
FILL_S: Final = 1.0


class Recorder:
    """An observer of samples of one model; the last ``MOST_REQUESTS`` that were answered are kept."""

    def __init__(self) -> None:
        self._kept: deque[tuple[InferenceRequest, Replay]] = deque(maxlen=MOST_REQUESTS)
        self._has_some = asyncio.Event()

    def __len__(self) -> int:
        return len(self._kept)

    async def observe(self, sample: Sample, replay: Replay) -> None:
        """See routing.Observer."""
        size = sum(len(tensor.data) for tensor in sample.request.inputs if tensor.data is not None)
        if sample.answer is not None and size <= MOST_BYTES:
            self._kept.append((sample.request, replay))
            self._has_some.set()

    async def fill(self, count_answers: Callable[[], int]) -> None:
        """Returns when there is something to warm with, or nobody asks (``count_answers``), or after a while."""
        before = count_answers()
        for patience_s in (IDLE_S, FILL_S):
            try:
                async with asyncio.timeout(patience_s):
                    await self._has_some.wait()
                return
            except TimeoutError:
                if count_answers() == before:
                    return

    async def warm(self, version: int) -> int:
        """Runs what is kept on a version that is ready and gets no requests yet; gives how many it answered.

        What fails there says nothing about the version: the gates look at real traffic.
        """
        answered = 0
        try:
            async with asyncio.timeout(PATIENCE_S):
                for request, replay in list(self._kept):
                    try:
                        await replay(request, version)
                        answered += 1
                    except AiorchError as error:
                        logger.info(
                            "'%s': a recorded request fails on version %d: %s", request.model_name, version, error
                        )
        except TimeoutError:
            logger.warning("recorded requests took more than %g s on version %d", PATIENCE_S, version)
        return answered
