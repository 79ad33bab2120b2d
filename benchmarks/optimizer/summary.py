"""The tables of the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.goals import OPTIMIZER_GOALS, Figures
from benchmarks.optimizer_figures import ENTRANTS, find_cells, find_goodput, find_ratio, list_points


def print_tables(result: Mapping[str, Any], out: Console) -> None:
    """Goodput of each policy, overload, and what was asked."""
    table = _make_table(
        "goodput: answers within the objective, per second", ["workload", "load"], [*ENTRANTS, "auto/best"]
    )
    for point in list_points(result):
        cells = []
        for entrant in ENTRANTS:
            value = find_goodput(result, *point, entrant)
            mark = " lag" if any(row["is_lagging"] for row in find_cells(result, *point, entrant)) else ""
            cells.append("-" if value is None else f"{value:,.1f}{mark}")
        ratio = find_ratio(result, *point, "best")
        cells.append("-" if ratio is None else f"{ratio[0]:.3f} ({ratio[1]:.3f}-{ratio[2]:.3f})")
        table.add_row(*point, *cells)
    out.print(table)
    if result["overload"]:
        table = _make_table(
            "overload", ["workload", "capacity", "server"], ["offered/s", "goodput", "p99 ms", "refused"]
        )
        for row in sorted(result["overload"], key=lambda row: (row["workload"], row["entrant"], row["factor"])):
            p99 = "-" if row["p99_us"] is None else f"{row['p99_us'] / 1000:,.1f}"
            numbers = (row["offered"] / row["seconds"], row["goodput"])
            shown = [*(f"{value:,.1f}" for value in numbers), p99, f"{row['refused']:,}"]
            table.add_row(row["workload"], f"{row['factor']:g}x", row["entrant"], *shown)
        out.print(table)
    table = _make_table("figures", ["figure", "asked"], ["reached", "enough"])
    for goal in OPTIMIZER_GOALS:
        table.add_row(*(cell.replace("**", "") for cell in goal.cells(Figures({}, optimizer=result))))
    out.print(table)
    for text in result["skipped"]:
        out.print(f"skipped: {text}", markup=False)


def _make_table(title: str, names: list[str], numbers: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
