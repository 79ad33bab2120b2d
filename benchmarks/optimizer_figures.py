"""What the comparison of batching policies says: single figures, with confidence intervals where they are ratios."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np

Result = Mapping[str, Any]
#: What the tuner is compared with besides the best fixed point; and all, in the order of tables.
RULES: Final = ("none", "fixed", "aimd", "linear")
ENTRANTS: Final = ("auto", "best", *RULES)
CHANGING: Final = ("bursts", "day", "step")
#: How far a foretold p99 may lie from the measured one, relative to that.
NEAR: Final = 0.15
_RESAMPLES: Final = 1000


def list_points(result: Result) -> list[tuple[str, str]]:
    """Workloads and loads of which there is a cell, in order."""
    return list(dict.fromkeys((row["workload"], row["load"]) for row in result["cells"]))


def find_cells(result: Result, workload: str, load: str, entrant: str) -> list[Any]:
    """By seed; ``none``, ``fixed`` and ``best`` are points that a workload's entry names."""
    names = result["workloads"][workload]["points"]
    name = names["best"].get(load, "") if entrant == "best" else names.get(entrant, entrant)
    found = [row for row in result["cells"] if (row["workload"], row["load"], row["entrant"]) == (workload, load, name)]
    return sorted(found, key=lambda row: int(row["seed"]))


def find_ratio(result: Result, workload: str, load: str, entrant: str) -> tuple[float, float, float] | None:
    """The tuner's goodput over another's under the same requests: the ratio, and its 95 % interval by bootstrap.

    What is drawn anew are seeds, and half seconds within them. None where a side is missing or had no good answer.
    """
    ours, theirs = (
        {row["seed"]: np.array(row["segments_good"]) for row in find_cells(result, workload, load, each)}
        for each in ("auto", entrant)
    )
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    their_sum = sum(int(their.sum()) for _, their in pairs)
    if not their_sum:
        return None
    random, drawn = np.random.default_rng(1), []
    for _ in range(_RESAMPLES):
        upper = lower = 0
        for index in random.integers(0, len(pairs), len(pairs)):
            mine, their = pairs[index]
            chosen = random.integers(0, len(mine), len(mine))
            upper, lower = upper + int(mine[chosen].sum()), lower + int(their[chosen].sum())
        drawn.append(upper / lower if lower else math.inf)
    ratio = sum(int(mine.sum()) for mine, _ in pairs) / their_sum
    # between two draws nothing is drawn: where the other side has no good answer the ratio is infinite
    low, high = (float(np.quantile(drawn, part, method="nearest")) for part in (0.025, 0.975))
    return ratio, low, high


def find_goodput(result: Result, workload: str, load: str, entrant: str) -> float | None:
    """Answers within the objective per second, in the mean over seeds."""
    rows = find_cells(result, workload, load, entrant)
    return float(np.mean([row["goodput"] for row in rows])) if rows else None


def _list_ratios(result: Result, loads: tuple[str, ...] = ()) -> list[float]:
    points = [point for point in list_points(result) if not loads or point[1] in loads]
    found = [find_ratio(result, *point, "best") for point in points]
    return [each[0] for each in found if each is not None]


def find_least_of_best(result: Result | None) -> float | None:
    """The tuner's goodput over the best static point's, where that is least."""
    return min(_list_ratios(result), default=None) if result else None


def find_changing_mean(result: Result | None) -> float | None:
    """The same in the mean over changing loads."""
    ratios = _list_ratios(result, CHANGING) if result else []
    return float(np.mean(ratios)) if ratios else None


def find_share(result: Result, workload: str, load: str, entrant: str) -> float | None:
    """The part of all requests that was answered within the objective."""
    rows = find_cells(result, workload, load, entrant)
    return float(np.mean([row["good_share"] for row in rows])) if rows else None


def find_lead(result: Result | None) -> float | None:
    """The tuner's share of good answers over that of the best rule, each in the mean over all cells that both have."""
    ratios = []
    for rule in RULES if result else ():
        assert result is not None
        shares = [[find_share(result, *point, each) for each in ("auto", rule)] for point in list_points(result)]
        both = [(ours, theirs) for ours, theirs in shares if ours is not None and theirs is not None]
        if their_sum := sum(theirs for _, theirs in both):
            ratios.append(sum(ours for ours, _ in both) / their_sum)
    return min(ratios, default=None)


def find_least_of_rules(result: Result | None) -> float | None:
    """The tuner's goodput over the best rule's, in the cell where that is least."""
    ratios = []
    for point in list_points(result) if result else ():
        assert result is not None
        ours = find_goodput(result, *point, "auto")
        theirs = [find_goodput(result, *point, rule) or 0.0 for rule in RULES]
        if ours is not None and max(theirs) > 0:
            ratios.append(ours / max(theirs))
    return min(ratios, default=None)


def find_recovery_s(result: Result | None) -> float | None:
    """Seconds after a step until the objective holds, at the longest; infinite where it did not come to that."""
    rows = [row for row in result["cells"] if (row["load"], row["entrant"]) == ("step", "auto")] if result else []
    found = [math.inf if row["recovery_s"] is None else float(row["recovery_s"]) for row in rows]
    return max(found, default=None)


def find_overload(result: Result, workload: str, factor: float, entrant: str) -> Mapping[str, Any] | None:
    """The row of an overload, if it was measured."""
    for row in result["overload"]:
        if (row["workload"], row["factor"], row["entrant"]) == (workload, factor, entrant):
            found: Mapping[str, Any] = row
            return found
    return None


def find_grace(result: Result | None) -> float | None:
    """The tuner's goodput at twice the capacity over that at capacity, where it is least."""
    ratios = []
    for workload in result["workloads"] if result else ():
        assert result is not None
        once, twice = (find_overload(result, workload, factor, "auto") for factor in (1.0, 2.0))
        if once and twice and once["goodput"]:
            ratios.append(twice["goodput"] / once["goodput"])
    return min(ratios, default=None)


def find_decisions(result: Result | None) -> float | None:
    """Moves in a minute of a steady load, where there were most."""
    rows = result["steady"] if result else []
    return max(
        (60 * sum(each["at_s"] >= 0 for each in row["decisions"]) / row["seconds"] for row in rows), default=None
    )


def find_missed_windows(result: Result | None) -> float | None:
    """Windows in a row after a move in which the objective was missed, at the most."""
    return max((float(row["missed_windows"]) for row in result["steady"]), default=None) if result else None


def find_cost(result: Result | None) -> float | None:
    """The tuner's part of a core under a steady load, in per cent, where it is most."""
    return max((100 * float(row["tuning_cores"]) for row in result["steady"]), default=None) if result else None


def list_foretold(result: Result) -> Iterator[tuple[float, float]]:
    """Measured and foretold p99 in us, of all cells with a fixed point that answered everything."""
    for row in [*result["grid"], *result["cells"]]:
        if found := row.get("foretold"):
            yield found["p99_us"], found["foretold_us"]


def find_near_percent(result: Result | None) -> float | None:
    """Cells whose p99 was foretold within 15 %, in per cent."""
    near = [abs(foretold / real - 1) <= NEAR for real, foretold in list_foretold(result)] if result else []
    return 100 * float(np.mean(near)) if near else None
