"""What the compiled shares should choose, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence

WORD = 1 << 64
#: (5 ** 0.5 - 1) / 2 and 3 ** 0.5 - 1, as parts of 2 ** 64.
VERSION_STEP, SAMPLE_STEP = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def mix(value: int) -> int:
    value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD % WORD
    value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53 % WORD
    return value ^ value >> 33


def hash_key(key: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in key:
        value = (value ^ byte) * 0x100000001B3 % WORD
    return mix(value)


class ShareModel:
    """As ``_core.Shares``; one thread."""

    def __init__(self, shares: Sequence[tuple[int, int]], is_sticky: bool = False, sampled: int = 0) -> None:
        self.shares = [(version, weight) for version, weight in shares if weight]
        self.is_sticky, self.sampled = is_sticky, sampled
        self.turns = self.keyed_turns = 0

    def choose(self, key: bytes = b"") -> tuple[int, bool]:
        if self.is_sticky and key:
            turn = self.keyed_turns
            self.keyed_turns += bool(self.sampled)
            version = self.find_by_key(key)
        else:
            turn = self.turns
            self.turns += 1
            version = self.find_by_point(turn * VERSION_STEP % WORD)
        return version, turn * SAMPLE_STEP % WORD < self.sampled * WORD // 10_000

    def find_by_point(self, point: int) -> int:
        total, below = sum(weight for _, weight in self.shares), 0
        for version, weight in self.shares:
            below += weight
            if point < below * WORD // total:
                return version
        raise AssertionError(f"{point} is beyond all shares")

    def find_by_key(self, key: bytes) -> int:
        def distance(share: tuple[int, int]) -> float:
            drawn = mix(hash_key(key) ^ share[0] * VERSION_STEP % WORD) >> 11
            return -math.log((drawn + 1) * 2.0**-53) / share[1]

        return min(self.shares, key=distance)[0]


def find_worst_window(versions: Sequence[int], wanted: int, share: float, window: int = 1000) -> float:
    """By how much ``wanted`` misses its share in the worst ``window`` in a row, in requests."""
    expected, inside, worst = share * window, versions[:window].count(wanted), 0.0
    worst = abs(inside - expected)
    for index in range(window, len(versions)):
        inside += (versions[index] == wanted) - (versions[index - window] == wanted)
        worst = max(worst, abs(inside - expected))
    return worst
