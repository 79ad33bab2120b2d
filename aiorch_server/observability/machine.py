"""CPU and memory of the machine, from Linux's /proc."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


class MachineProbe:
    """Reads utilization and memory; where /proc has no such file, the answers are None.

    Utilization is that of all CPUs between two readings at least ``min_interval_s`` apart, so that several scrapers
    do not shorten each other's window to noise; ``clock`` gives seconds.
    """

    def __init__(
        self,
        proc: Path = Path("/proc"),
        *,
        min_interval_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._proc = proc
        self._min_interval_s = min_interval_s
        self._clock = clock
        self._read_at_s = clock()
        self._ticks = self._read_ticks()
        self._utilization: float | None = None

    def read_cpu_utilization(self) -> float | None:
        """The share of CPU time that was not idle, 0.0 to 1.0; None before there are two readings."""
        now_s = self._clock()
        if now_s - self._read_at_s >= self._min_interval_s:
            ticks = self._read_ticks()
            if ticks is not None and self._ticks is not None:
                busy, total = (after - before for before, after in zip(self._ticks, ticks, strict=True))
                if total > 0:
                    self._utilization = min(1.0, max(0.0, busy / total))
            self._read_at_s, self._ticks = now_s, ticks
        return self._utilization

    def read_memory_bytes(self) -> tuple[int, int] | None:
        """Total and used memory; used is what is not available (proc(5), MemAvailable)."""
        fields: dict[str, int] = {}
        try:
            with (self._proc / "meminfo").open(encoding="ascii") as lines:
                for line in lines:
                    key, _, rest = line.partition(":")
                    if key in ("MemTotal", "MemAvailable"):
                        fields[key] = int(rest.split()[0]) * 1024
            return fields["MemTotal"], fields["MemTotal"] - fields["MemAvailable"]
        except (OSError, ValueError, LookupError):
            return None

    def _read_ticks(self) -> tuple[int, int] | None:
        """Busy and all clock ticks of all CPUs since boot; guest time is already in user time (proc(5))."""
        try:
            with (self._proc / "stat").open(encoding="ascii") as lines:
                ticks = [int(word) for word in lines.readline().split()[1:9]]
            total = sum(ticks)
            return total - ticks[3] - ticks[4], total
        except (OSError, ValueError, LookupError):
            return None
