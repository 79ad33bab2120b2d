"""How much memory models take on each device, what the devices may give, and who has it; thread-safe."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

CPU: Final = "cpu"
#: Bytes by device, as instances name devices: ``cpu``, ``cuda:0``.
Charge = Mapping[str, int]
_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB")
_MAX_FILES: Final = 10_000


class Holding:
    """What one model version has of the devices' memory, until ``release``."""

    __slots__ = ("_charge", "_ledger", "label")

    def __init__(self, ledger: MemoryLedger, label: str, charge: Charge) -> None:
        self.label = label
        self._ledger = ledger
        self._charge = dict(charge)

    @property
    def charge(self) -> Charge:
        """Bytes by device."""
        return self._charge

    @property
    def is_budgeted(self) -> bool:
        """Whether there is a budget for some device."""
        return self._ledger.has_budgets

    def settle(self, charge: Charge) -> None:
        """It turned out to be so much; whether that fits is not asked any more."""
        with self._ledger.lock:
            self._charge = dict(charge)

    def release(self) -> None:
        """Gives all of it back; a second call does nothing."""
        with self._ledger.lock:
            self._ledger.holdings.pop(self, None)


class MemoryLedger:
    """``budgets`` are bytes by device; a device without one gives whatever is asked for."""

    def __init__(self, budgets: Charge) -> None:
        self.budgets = dict(budgets)
        self.lock = threading.Lock()
        self.holdings: dict[Holding, None] = {}  # in the order of coming

    @property
    def has_budgets(self) -> bool:
        """Whether anything is bounded at all."""
        return bool(self.budgets)

    def take(self, label: str, need: Charge) -> Holding | None:
        """``need`` for ``label``, a model version; None if a budget has no room for it."""
        with self.lock:
            if self._find_lack(need):
                return None
            holding = Holding(self, label, need)
            self.holdings[holding] = None
            return holding

    def list_charges(self) -> list[tuple[str, int, Charge]]:
        """Model, version and bytes by device of all who have something."""
        found: dict[str, dict[str, int]] = {}
        with self.lock:
            for each in self.holdings:  # two of one label while a version is loaded anew
                found[each.label] = add_charges((found.get(each.label, {}), each.charge))
        return [(label.rpartition(":")[0], int(label.rpartition(":")[2]), found[label]) for label in found]

    def find_lack(self, need: Charge) -> dict[str, int]:
        """How many bytes too few there are for ``need``, by device; empty if it fits."""
        with self.lock:
            return self._find_lack(need)

    def _find_lack(self, need: Charge) -> dict[str, int]:
        used = self._sum()
        lacks = {
            device: used.get(device, 0) + size - self.budgets[device]
            for device, size in need.items()
            if device in self.budgets and size
        }
        return {device: lack for device, lack in lacks.items() if lack > 0}

    def find_excess(self) -> dict[str, int]:
        """How many bytes more are taken than the budgets give, by device."""
        with self.lock:
            used = self._sum()
        return {
            device: used.get(device, 0) - size for device, size in self.budgets.items() if used.get(device, 0) > size
        }

    def list_holders(self, device: str) -> str:
        """Who has how much of a device; for people."""
        with self.lock:
            holders = [(each.label, each.charge.get(device, 0)) for each in self.holdings]
        return ", ".join(f"'{label}' {write_size(size)}" for label, size in holders if size) or "nobody"

    def _sum(self) -> dict[str, int]:
        return add_charges(holding.charge for holding in self.holdings)

    def explain(self, label: str, need: Charge) -> str:
        """Why there is no ``need`` for ``label``, with the budgets and who has them."""
        parts = [
            f"{device}: it needs {write_size(need[device])}, the memory budget is {write_size(self.budgets[device])}, "
            f"taken by {self.list_holders(device)}"
            for device in self.find_lack(need)
        ]
        return f"no room for '{label}': {'; '.join(parts)}"


def add_charges(charges: Iterable[Charge]) -> dict[str, int]:
    """The sum, by device."""
    total: dict[str, int] = {}
    for charge in charges:
        for device, size in charge.items():
            total[device] = total.get(device, 0) + size
    return total


def read_resident_bytes() -> int:
    """What this process has in memory now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def measure_files(path: Path) -> int:
    """Bytes of the files in the folder that holds an artefact, or is one; blocks. Stops counting after many files."""
    folder = path if path.is_dir() else path.parent
    total, count = 0, 0
    for root, _, names in os.walk(folder):
        for name in names:
            count += 1
            if count > _MAX_FILES:
                return total
            try:
                total += Path(root, name).stat().st_size
            except OSError:
                continue
    return total


def write_size(size: int) -> str:
    """``1.5 GiB``: for people."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.4g} {_UNITS[unit]}"
