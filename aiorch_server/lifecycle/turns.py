"""Taking turns: a model that is always in use makes room for others that wait, without losing a request.

It is paused: its requests under way are answered, and new ones wait for its next load. If they are not answered soon,
it takes requests again, and is left alone for so long that it was paused for a tenth of the time at most.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from aiorch_server.lifecycle.model import ManagedModel

#: A turn is never shorter, whatever is configured; nor than what the model's load took.
SHORTEST_TURN_S: Final = 1.0
#: A pause is so many times as long as the model's requests take on average, within bounds.
_PAUSE_FACTOR: Final = 20
_SHORTEST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 2.0
_PAUSED_SHARE: Final = 0.1
#: How often it is looked whether requests are answered: on the compiled path they wake nobody when they end.
LOOK_S: Final = 0.02


class Turns:
    """``residence_s``: a model serves for so long at least before its turn is over. For the event loop's thread."""

    def __init__(self, residence_s: float) -> None:
        self._residence_s = max(residence_s, SHORTEST_TURN_S)
        self._left_alone: dict[str, float] = {}  # until when

    def is_over(self, model: ManagedModel) -> bool:
        """Whether it has served for a while, and what is under way is likely to end soon."""
        now = time.monotonic()
        return (
            not model.is_changing
            and not model.waiters
            and self._left_alone.get(model.name, 0.0) <= now
            and not any(each.has_sequences for each in model.servables())
            and self.find_end(model) <= now
        )

    def find_end(self, model: ManagedModel) -> float:
        """When its turn is over, on the monotonic clock, if nothing else is against that."""
        return max(
            (each.loaded_at + max(self._residence_s, each.load_seconds) for each in model.servables()), default=0.0
        )

    async def end(self, model: ManagedModel, reason: str) -> bool:
        """Pauses the model, and unloads it for ``reason`` once its requests are answered; whether it came to that."""
        # A change under way may wait for the very model whose load asks for this; waiters were told that it is ready,
        # and have yet to take their leases; what is no longer on demand would be brought back by nobody.
        if model.is_changing or model.waiters or not model.is_on_demand:
            return False
        async with model.changing():
            limit_s = _choose_pause(model)
            began = time.monotonic()
            model.pause()
            try:
                while not (is_quiet := all(each.is_idle for each in model.servables())):
                    if time.monotonic() - began >= limit_s:
                        break
                    await asyncio.sleep(LOOK_S)
            except BaseException:
                model.resume()
                raise
            if not is_quiet:
                model.resume()
                now = time.monotonic()
                self._left_alone = {name: until for name, until in self._left_alone.items() if until > now}
                self._left_alone[model.name] = now + (now - began) / _PAUSED_SHARE
                return False
            await unload_for_others(model, reason)
        return True


async def unload_for_others(model: ManagedModel, reason: str) -> None:
    """Unloads a model that requests may bring back; within ``changing``."""
    is_asked = model.is_asked
    await model.unload(reason)
    model.is_asked = is_asked


def _choose_pause(model: ManagedModel) -> float:
    answered = [each.statistics().success for each in model.servables()]
    longest_ns = max((each.ns / each.count for each in answered if each.count), default=0.0)
    return min(max(_PAUSE_FACTOR * longest_ns / 1e9, _SHORTEST_PAUSE_S), LONGEST_PAUSE_S)
