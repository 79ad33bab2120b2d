"""What was seen of one model version in a stretch of time, and a short memory of it. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

#: Looks that are kept: some minutes of one a second.
_MOST: Final = 300
#: A share is missed "surely" at this many standard errors.
_SURE: Final = 2.0


@dataclass(frozen=True, slots=True)
class Sight:
    """Requests that came, were answered, late or not, and refused for want of time or room; in ``seconds``.

    ``percentile_us`` is that of the answered ones. Instances were busy with ``rows`` for ``busy_us`` in all.
    """

    seconds: float = 0.0
    arrivals: int = 0
    answered: int = 0
    late: int = 0
    refused: int = 0
    percentile_us: float = 0.0
    rows: float = 0.0
    busy_us: float = 0.0

    @property
    def row_us(self) -> float:
        """What a row cost; 0 where none ran."""
        return self.busy_us / self.rows if self.rows else 0.0

    @property
    def rate(self) -> float:
        """Arrivals per second."""
        return self.arrivals / self.seconds if self.seconds else 0.0

    @property
    def ended(self) -> int:
        """Requests that got an answer or a refusal."""
        return self.answered + self.refused

    @property
    def missed(self) -> int:
        """Those of them that did not keep the target."""
        return self.late + self.refused

    @property
    def missed_share(self) -> float:
        """Of those that ended."""
        return self.missed / self.ended if self.ended else 0.0

    @property
    def share_error(self) -> float:
        """Standard error of the share, by the rule of succession: of few requests it is never 0."""
        share = (self.missed + 1) / (self.ended + 2)
        return math.sqrt(share * (1 - share) / (self.ended + 2))

    def misses_surely(self, allowed: float) -> bool:
        """Whether more than the allowed share missed, by more than chance."""
        return self.missed_share - _SURE * self.share_error > allowed


def join(sights: Iterable[Sight]) -> Sight:
    """Several stretches as one; its percentile is the mean of theirs, weighed by their answers."""
    kept = list(sights)
    answered = sum(each.answered for each in kept)
    return Sight(
        sum(each.seconds for each in kept),
        sum(each.arrivals for each in kept),
        answered,
        sum(each.late for each in kept),
        sum(each.refused for each in kept),
        sum(each.percentile_us * each.answered for each in kept) / answered if answered else 0.0,
        sum(each.rows for each in kept),
        sum(each.busy_us for each in kept),
    )


class Trail:
    """The last looks, the newest at the end."""

    def __init__(self) -> None:
        self._looks: deque[Sight] = deque(maxlen=_MOST)

    def add(self, sight: Sight) -> None:
        """Takes in the stretch since the last one."""
        self._looks.append(sight)

    def forget(self) -> None:
        """What is added from here on is all there is."""
        self._looks.clear()

    def whole(self) -> Sight:
        """All of it."""
        return join(self._looks)

    def recent(self, seconds: float) -> Sight:
        """The last so many seconds, or as much as there is."""
        chosen: list[Sight] = []
        for look in reversed(self._looks):
            if sum(each.seconds for each in chosen) >= seconds:
                break
            chosen.append(look)
        return join(chosen)
