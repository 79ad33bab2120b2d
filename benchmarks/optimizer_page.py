"""The page's section about batching policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from benchmarks.optimizer_figures import (
    ENTRANTS,
    find_cells,
    find_goodput,
    find_overload,
    find_ratio,
    list_foretold,
    list_points,
)
from benchmarks.tables import make_grid

Result = Mapping[str, Any]
_TITLES: Final = {
    "auto": "the tuner",
    "fixed": "fixed",
    "triton": "Triton, its default queue",
    "triton_timed": "Triton, queue bounded by time",
    "triton_sized": "Triton, queue bounded by size",
}


def render_optimizer(result: Result) -> str:
    """The section as Markdown; what was not measured is left out."""
    machine, seeds, settings = result["machine"], result["seeds"], result["settings"]
    points = list_points(result)
    loads = "; ".join(f"*{name}*: {text}" for name, text in settings["loads"].items())
    parts = [
        "## Batching policies\n\n"
        "One server on one core serves the same model under each policy in turn; an open loop on the other core sends "
        "requests at times that were drawn before, the same for all policies, and counts from when they were due. "
        f"*Goodput* is answers within the objective per second. {'Quick runs' if settings['is_quick'] else 'Runs'} of "
        f"{settings['seconds']:g} s after {settings['ramp_s']:g} s, seeds {', '.join(map(str, seeds['reported']))}, "
        f"drawn for this run (commit {machine['commit'] or 'unknown'}, {machine['date']}). Loads: {loads}.\n\n"
        "*auto* is a model with an objective and nothing else said. *best* is that fixed point of a grid of largest "
        "batches and delays that does best under just this load; *none* takes one request at a time, *fixed* is "
        "`dynamic_batching { }`, *aimd* is Clipper's rule and *linear* BentoML's ([tuning.md](tuning.md)).",
        _render_workloads(result),
    ]
    if points:
        parts.append(_render_goodput(result))
        parts.append("![Answers within the objective](benchmarks/policies.svg)")
    for workload in result["workloads"]:
        if find_cells(result, workload, "step", "auto"):
            parts.append(f"![{workload}: a step](benchmarks/story-{workload}.svg)")
    if result["steady"]:
        parts.append(_render_steady(result))
    if result["overload"]:
        parts.append(_render_overload(result))
    if foretold := [foretold / real for real, foretold in list_foretold(result)]:
        middle = sorted(foretold)[len(foretold) // 2]
        parts.append(
            f"**Simulation.** The p99 that the simulation makes of a cell's requests and run times is {middle:.2f} of "
            f"the measured one in the median of {len(foretold)} cells with a fixed point ({min(foretold):.2f} to "
            f"{max(foretold):.2f})."
        )
    left_out = [*result["skipped"], *result["errors"]]
    if left_out:
        parts.append("Left out:\n\n" + "\n".join(f"- {text.splitlines()[0]}" for text in left_out))
    return "\n\n".join(parts)


def _render_workloads(result: Result) -> str:
    rows = []
    for name, about in result["workloads"].items():
        curve = ", ".join(f"{count}: {value:.3g}" for count, value in about["curve_ms"].items())
        rows.append(
            [
                name,
                f"{about['objective_us'] / 1000:g} ms",
                str(about["request_rows"]),
                curve,
                f"{about['gain']:.2f}",
                f"{about['capacity']:,.0f}" if "capacity" in about else "-",
            ]
        )
    header = [
        "model",
        "p99 within",
        "rows of a request",
        "ms by requests in a batch",
        "gain of the largest",
        "capacity/s",
    ]
    return make_grid(header, rows)


def _render_goodput(result: Result) -> str:
    rows = []
    for workload, load in list_points(result):
        cells = [workload, load, _format(_find_offered(result, workload, load))]
        for entrant in ENTRANTS:
            mark = " (lag)" if any(row["is_lagging"] for row in find_cells(result, workload, load, entrant)) else ""
            cells.append(_format(find_goodput(result, workload, load, entrant)) + mark)
        ratio = find_ratio(result, workload, load, "best")
        cells.append("-" if ratio is None else f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})")
        cells.append(result["workloads"][workload]["points"]["best"].get(load, "-"))
        rows.append(cells)
    return (
        "Goodput, and the tuner's over that of the best point with its 95 % interval (bootstrap over seeds and half "
        "seconds); *lag*: the caller itself was late by a p99 of more than a tenth of the objective.\n\n"
        + make_grid(["model", "load", "offered/s", *ENTRANTS, "auto / best", "best point"], rows, names=2)
    )


def _render_steady(result: Result) -> str:
    rows = [
        [
            row["workload"],
            f"{row['seconds']:g}",
            str(sum(each["at_s"] >= 0 for each in row["decisions"])),
            str(row["missed_windows"]),
            f"{100 * row['good_share']:.2f}",
            f"{100 * row['tuning_cores']:.2f}",
        ]
        for row in result["steady"]
    ]
    header = ["model", "seconds", "moves", "missed windows after one", "good %", "tuner, % of a core"]
    return "**Steady.** A load that stays as it is (Poisson, 70 %).\n\n" + make_grid(header, rows)


def _render_overload(result: Result) -> str:
    rows = []
    for workload in result["workloads"]:
        for entrant, title in _TITLES.items():
            once, twice = (find_overload(result, workload, factor, entrant) for factor in (1.0, 2.0))
            if once is None and twice is None:
                continue
            shown = [
                ("-", "-") if row is None else (_format(row["goodput"]), _format(_in_ms(row))) for row in (once, twice)
            ]
            is_whole = once is not None and twice is not None and once["goodput"] > 0
            ratio = f"{twice['goodput'] / once['goodput']:.2f}" if is_whole and once and twice else "-"
            mark = " (lag)" if twice is not None and twice["is_lagging"] else ""
            rows.append([workload, title, *shown[0], *shown[1], ratio + mark])
    header = ["model", "server", "goodput at 1x", "p99 ms", "goodput at 2x", "p99 ms", "2x / 1x"]
    return (
        "**Overload.** Poisson at once and twice the capacity; the p99 is that of what was answered.\n\n"
        + make_grid(header, rows, names=2)
    )


def _find_offered(result: Result, workload: str, load: str) -> float | None:
    for row in result["cells"]:
        if (row["workload"], row["load"]) == (workload, load):
            return float(row["offered"] / row["seconds"])
    return None


def _in_ms(row: Result) -> float | None:
    return None if row["p99_us"] is None else row["p99_us"] / 1000


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
