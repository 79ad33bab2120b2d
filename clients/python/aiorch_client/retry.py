"""When to try again: pure, the random number and the error are passed in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from aiorch_client.errors import ClientError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential back-off with jitter, bounded in count; the call's deadline bounds it as well.

    ``max_attempts`` counts the first one; 1 means no retries. The pause before attempt n + 1 is drawn evenly from
    the upper half of ``initial_backoff_s * multiplier ** (n - 1)``, at most ``max_backoff_s``. A pause that the server
    asks for is kept instead, with up to a quarter of it on top, or half of ``initial_backoff_s`` if that is more, so
    that those who were refused together do not return as one.
    Only errors that are ``retryable`` are tried again: never CANCELLED or DEADLINE_EXCEEDED.
    """

    max_attempts: int = 3
    initial_backoff_s: float = 0.05
    max_backoff_s: float = 2.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        problems = []
        if self.max_attempts < 1:
            problems.append(f"max_attempts is {self.max_attempts}, it must be 1 (no retries) or more")
        if not 0 <= self.initial_backoff_s <= self.max_backoff_s < math.inf:
            problems.append(
                f"back-off runs from {self.initial_backoff_s} s to {self.max_backoff_s} s, expected 0 <= initial <= max"
            )
        if not 1 <= self.multiplier <= 10:
            problems.append(f"multiplier is {self.multiplier}, it must be 1 to 10")
        if problems:
            raise ValueError("; ".join(problems))

    def pause_s(self, attempt: int, error: ClientError, fraction: float) -> float | None:
        """Seconds to wait after failed attempt number ``attempt`` (from 1); None where it was the last.

        ``fraction`` is a random number in [0, 1).
        """
        if not error.retryable or attempt >= self.max_attempts:
            return None
        if error.retry_after_s is not None:
            return self.spread_s(error.retry_after_s, fraction)
        return self.backoff_s(attempt, fraction)

    def spread_s(self, retry_after_s: float, fraction: float) -> float:
        """The pause where the server asks for one."""
        return retry_after_s + max(self.initial_backoff_s / 2, retry_after_s / 4) * fraction

    def backoff_s(self, attempt: int, fraction: float) -> float:
        """The pause before attempt ``attempt`` + 1 where the server asks for none."""
        # the exponent is bounded so that a large attempt count cannot overflow
        longest_s = min(self.max_backoff_s, self.initial_backoff_s * self.multiplier ** min(attempt - 1, 64))
        return longest_s * (0.5 + fraction / 2)


NO_RETRIES = RetryPolicy(max_attempts=1)
