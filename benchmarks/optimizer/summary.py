"""What the cells say together: ratios with confidence intervals, and the table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

Result = Mapping[str, Any]
ENTRANTS: Final = ("auto", "best", "none", "fixed", "aimd", "linear")
_RESAMPLES: Final = 2000


def find_cells(result: Result, workload: str, load: str, entrant: str) -> list[Any]:
    """By seed."""
    return sorted(
        (row for row in result["cells"] if (row["workload"], row["load"], row["entrant"]) == (workload, load, entrant)),
        key=lambda row: row["seed"],
    )


def list_points(result: Result) -> list[tuple[str, str]]:
    """Workloads and loads of which there is a cell, in order."""
    return list(dict.fromkeys((row["workload"], row["load"]) for row in result["cells"]))


def find_ratio(result: Result, workload: str, load: str, entrant: str) -> tuple[float, float, float] | None:
    """The tuner's goodput over another's under the same requests: the ratio, and its 95 % interval by bootstrap.

    What is drawn anew are seeds, and segments within them. None where a side is missing or had no good answer.
    """
    ours, theirs = (
        {row["seed"]: np.array(row["segments_good"]) for row in find_cells(result, workload, load, each)}
        for each in ("auto", entrant)
    )
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = [(ours[seed], theirs[seed]) for seed in seeds]
    if not pairs or not sum(int(their.sum()) for _, their in pairs):
        return None
    random, drawn = np.random.default_rng(1), []
    for _ in range(_RESAMPLES):
        upper = lower = 0
        for index in random.integers(0, len(pairs), len(pairs)):
            mine, their = pairs[index]
            chosen = random.integers(0, len(mine), len(mine))
            upper, lower = upper + int(mine[chosen].sum()), lower + int(their[chosen].sum())
        drawn.append(upper / lower if lower else np.inf)
    ratio = sum(int(mine.sum()) for mine, _ in pairs) / sum(int(their.sum()) for _, their in pairs)
    return ratio, float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def _mean(rows: Sequence[Any], key: str) -> float | None:
    found = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(found)) if found else None


def print_tables(result: Result, out: Console) -> None:
    """Goodput of each policy, and ours against each."""
    table = Table(title="goodput: answers within the objective, per second", title_justify="left")
    for name in ("workload", "load", "offered/s"):
        table.add_column(name, justify="left" if name != "offered/s" else "right")
    for entrant in ENTRANTS:
        table.add_column(entrant, justify="right")
    table.add_column("auto / best", justify="right")
    for workload, load in list_points(result):
        offered, cells = None, []
        for entrant in ENTRANTS:
            rows = find_cells(result, workload, load, entrant)
            if rows and offered is None:
                offered = float(np.mean([row["offered"] / row["seconds"] for row in rows]))
            value = _mean(rows, "goodput")
            mark = " lag" if any(row["is_lagging"] for row in rows) else ""
            cells.append("-" if value is None else f"{value:,.1f}{mark}")
        ratio = find_ratio(result, workload, load, "best")
        cells.append("-" if ratio is None else f"{ratio[0]:.3f} ({ratio[1]:.3f}-{ratio[2]:.3f})")
        table.add_row(workload, load, f"{offered or 0:,.0f}", *cells)
    out.print(table)
