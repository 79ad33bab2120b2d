"""Renders docs/benchmarks.md and its charts from the stored results; no figure on that page is typed.

``report.py`` writes the page, ``report.py --check`` fails when it is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.charts import Bar, draw_bars
from benchmarks.goals import GOALS, OURS, Figures
from benchmarks.optimizer.plots import draw_policies, draw_story
from benchmarks.optimizer_page import render_optimizer
from benchmarks.rollout_figures import render_rollout
from benchmarks.tables import make_grid

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
CHARTS = ROOT / "docs" / "benchmarks"
#: Cores used by other programs above which a point says more about the machine than about the servers.
QUIET_CORES = 0.15
#: The load that is told second by second.
STORY = "step"
#: Above this a request is large enough for bytes per second to mean something.
_LARGE_BYTES = 100_000
COLUMNS = (
    "req/s",
    "cores",
    "req/s/core",
    "CPU us/req",
    "p50 us",
    "p99 us",
    "load/other",
    "x req/s",
    "x per core",
)


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One server at one point, with ours divided by it (None without ours, or for ours)."""

    contest: str
    shape: str
    title: str
    is_ours: bool
    row: Mapping[str, Any]
    rate_ratio: float | None
    core_ratio: float | None

    @property
    def point(self) -> tuple[str, str]:
        return self.contest, self.shape

    def cells(self) -> list[str]:
        row = self.row
        return [
            f"{row['req_per_s']:,.0f} ±{50 * (row['req_per_s_max'] - row['req_per_s_min']) / row['req_per_s']:.0f}%",
            f"{row['server_cores']:.2f}",
            f"{row['req_per_s_per_core']:,.0f}",
            f"{row['cpu_us_per_request']:,.1f}",
            f"{row['p50_us']:,.0f}",
            f"{row['p99_us']:,.0f}",
            f"{row['load_cores']:.2f}/{row['other_cores']:.2f}",
            format_ratio(self.rate_ratio),
            format_ratio(self.core_ratio),
        ]


def compare(result: Mapping[str, Any]) -> Iterator[ComparedRow]:
    """The result's rows in their order, each beside our server's figures at the same point of the same run."""
    ours = {_point(row): row for row in result["rows"] if row["server"] == OURS}
    for row in result["rows"]:
        mine = ours.get(_point(row)) if row["server"] != OURS else None
        yield ComparedRow(
            contest=row["contest"],
            shape=f"{row['connections']}x{row['streams']}",
            title=result["servers"][row["server"]]["title"],
            is_ours=row["server"] == OURS,
            row=row,
            rate_ratio=mine["req_per_s"] / row["req_per_s"] if mine else None,
            core_ratio=mine["req_per_s_per_core"] / row["req_per_s_per_core"] if mine else None,
        )


def _point(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["contest"], row["connections"], row["streams"]


def format_ratio(ratio: float | None) -> str:
    """``4.2x``, or a dash where there is nothing to divide."""
    return "-" if ratio is None else f"{ratio:.1f}x"


def warn_if_noisy(result: Mapping[str, Any]) -> str:
    """What to say when other programs were busy during the run; empty on a quiet machine."""
    noisy = sum(row["other_cores"] > QUIET_CORES for row in result["rows"])
    if not noisy:
        return ""
    return (
        f"The machine was not quiet: in {noisy} of {len(result['rows'])} rows other programs used more than "
        f"{QUIET_CORES} cores. Servers suffer from that unequally, so neither figures nor ratios are final."
    )


def render(
    peers: Mapping[str, Any],
    micro: Mapping[str, Any] | None = None,
    memory: Mapping[str, Any] | None = None,
    profile: Mapping[str, Any] | None = None,
    rollout: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
) -> str:
    """The whole page as Markdown; what was not measured is left out."""
    parts = [_render_head()]
    if warning := warn_if_noisy(peers):
        parts.append(f"**{warning}**")
    parts += [
        _render_goals(Figures(peers, memory, rollout, optimizer)),
        _render_machine(peers["machine"], peers["settings"]),
    ]
    parts.append(_render_servers(peers["servers"]))
    parts += [_render_contest(peers, contest) for contest in peers["contests"]]
    parts.append(_render_starts(peers))
    if memory is not None:
        parts.append(_render_memory(memory))
    if rollout is not None:
        parts.append(render_rollout(rollout))
    if optimizer is not None:
        parts.append(render_optimizer(optimizer))
    if profile is not None:
        parts.append(_render_profile(profile))
    if peers["void"]:
        parts.append("## Void\n\n" + "\n".join(f"- {text.splitlines()[0]}" for text in peers["void"]))
    if micro is not None:
        parts.append(_render_micro(micro))
    return "\n\n".join(parts) + "\n"


def _render_head() -> str:
    return """# Benchmarks

<!-- Rendered by benchmarks/report.py from benchmarks/results; do not edit. -->

The servers of a contest share one core and take turns, the others idle meanwhile; `h2load` posts the same request
from another core. What stands in one table was measured in one run; compare latencies only within one point, because
every caller sends its next request when the last is answered. Answers are checked by a real client before and after
each point, and every run must get exactly the bytes of a right answer per request.

- *cores*: how much of its core the server's whole process tree used; *req/s/core* is req/s divided by that, and *CPU
  us/req* the same thing upside down: the figures to compare, because they do not depend on which side saturates first.
- *±*: half the distance between the slowest and the fastest run.
- *load/other*: cores that `h2load` and everything else on the machine used. Near 1.00 for the load, `h2load` was the
  limit and the server could do more; near 0 for the others, the machine was quiet.
- *x req/s*, *x per core*: AIOrchestrator's figure divided by the one in the row; above 1, AIOrchestrator is faster.
- With several streams per connection `h2load` sends many requests in one segment, which favours servers that handle a
  whole read at once; one stream on each of 32 connections is closest to independent callers.
- *p50*, *p99*: from a run of their own that logs every request, which costs the load generator some of its speed."""


def _render_machine(machine: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    state = " with uncommitted changes" if machine["has_uncommitted_changes"] else ""
    loads = " / ".join(f"{value:.2f}" for value in machine["load_average"])
    lines = [
        f"- {machine['cpu']}, {machine['cores'] or machine['logical_cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}, kernel {machine['kernel']}, Python {machine['python']}",
        f"- {packages}",
        f"- commit {machine['commit'] or 'unknown'}{state}, {machine['date']}, load average before the run {loads}",
        f"- {settings['runs']} runs of about {settings['seconds']:g} s per server and point, the median is shown",
    ]
    return "## Measured on\n\n" + "\n".join(lines)


def _render_servers(servers: Mapping[str, Mapping[str, str]]) -> str:
    return "## Servers\n\n" + make_grid(
        ["server", "settings"], [[entry["title"], entry["settings"]] for entry in servers.values()], numbers=False
    )


def _render_goals(figures: Figures) -> str:
    peers = figures.peers
    answers = sum(run["requests"] for row in peers["rows"] for run in row["runs"])
    return (
        "## In short\n\n"
        + make_grid(["figure", "asked", "reached", "enough"], [goal.cells(figures) for goal in GOALS], numbers=False)
        + f"\n\n{answers:,} timed answers, {len(peers['void'])} rows void; a lost, wrong or mixed-up answer "
        "voids its row."
    )


def _render_contest(peers: Mapping[str, Any], contest: Mapping[str, Any]) -> str:
    rows = [row for row in compare(peers) if row.contest == contest["name"]]
    parts = [f"## {contest['name']}", f"{contest['text']} max_batch_size {contest['max_batch']}."]
    if not rows:
        return "\n\n".join([*parts, "No point of it counts."])
    parts.append(
        make_grid(["conns x streams", "server", *COLUMNS], [[r.shape, r.title, *r.cells()] for r in rows], names=2)
    )
    if ceilings := [entry for entry in peers["ceilings"] if entry["contest"] == contest["name"]]:
        best = max(entry["rows_per_s"] for entry in ceilings)
        served = max(row.row["req_per_s"] for row in rows if row.is_ours) if any(r.is_ours for r in rows) else 0.0
        texts = [f"{entry['rows_per_s']:,.0f} at batch {entry['batch']}" for entry in ceilings]
        parts.append(
            f"The ceiling, onnxruntime alone on that core, rows/s: {', '.join(texts)}. AIOrchestrator's best point is "
            f"{served / best:.0%} of the best."
        )
    if contest["row_bytes"] >= _LARGE_BYTES:
        texts = [f"{r.shape} {r.title} {r.row['input_mb_per_s_per_core']:,.0f}" for r in rows]
        parts.append(f"Input MB/s per core: {', '.join(texts)}.")
    parts.append(f"![Requests/s per server core]({CHARTS.name}/{contest['name']}.svg)")
    return "\n\n".join(parts)


def draw_charts(peers: Mapping[str, Any]) -> dict[str, str]:
    """Contest -> SVG of requests/s per server core, for those contests that have rows."""
    charts = {}
    for contest in peers["contests"]:
        rows = [row for row in compare(peers) if row.contest == contest["name"]]
        bars = [Bar(row.shape, row.title, row.row["req_per_s_per_core"], row.is_ours) for row in rows]
        if bars:
            charts[contest["name"]] = draw_bars(f"{contest['name']}: requests/s per server core, logarithmic", bars)
    return charts


def draw_optimizer(optimizer: Mapping[str, Any]) -> dict[str, str]:
    """Name -> SVG: the comparison of batching policies, and a changing load of each model second by second."""
    charts = {"policies": draw_policies(optimizer)}
    return charts | {f"story-{name}": draw_story(optimizer, name, STORY) for name in optimizer["workloads"]}


def _render_starts(peers: Mapping[str, Any]) -> str:
    rows = [
        [
            start["contest"],
            peers["servers"][start["server"]]["title"],
            f"{start['ready_s']:.2f}",
            f"{start['rss_mb']:,.0f}",
            f"{start['pss_mb']:,.0f}",
            str(start["processes"]),
        ]
        for start in peers["starts"]
    ]
    return (
        "## Start and idle memory\n\nFrom the command to the first right answer, on the one core; memory of all the "
        "server's processes just after (PSS counts pages that processes share only once).\n\n"
        + make_grid(["contest", "server", "start s", "RSS MB", "PSS MB", "processes"], rows, names=2)
    )


def _render_memory(memory: Mapping[str, Any]) -> str:
    samples = memory["samples"]
    shown = [samples[index] for index in sorted({round(part * (len(samples) - 1) / 5) for part in range(6)})]
    rows = [[f"{sample['requests']:,}", f"{sample['rss_mb']:.1f}", f"{sample['pss_mb']:.1f}"] for sample in shown]
    return (
        f"## Memory over time\n\n{memory['text']} After {samples[-1]['requests']:,} requests RSS differs by "
        f"{memory['growth_percent']:+.1f} % from that after {samples[0]['requests']:,} "
        f"(commit {memory['machine']['commit'] or 'unknown'}).\n\n"
        + make_grid(["requests", "RSS MB", "PSS MB"], rows, names=0)
    )


def _render_profile(profile: Mapping[str, Any]) -> str:
    names = [point["name"] for point in profile["points"]]
    groups = sorted({group for point in profile["points"] for group in point["groups"]}, key=str)
    groups.sort(key=lambda group: -sum(point["groups"].get(group, 0.0) for point in profile["points"]))
    rows = [[group, *(f"{point['groups'].get(group, 0.0):.1f}" for point in profile["points"])] for group in groups]
    parts = [
        "## Where the time goes\n\nSamples of this server's CPU time by `perf`, in per cent, identity "
        f"(commit {profile['machine']['commit'] or 'unknown'}).",
        make_grid(["part", *names], rows),
    ]
    for point in profile["points"]:
        tops = [[top["symbol"], top["group"], f"{top['percent']:.1f}"] for top in point["symbols"]]
        parts.append(
            f"The costliest functions at {point['name']}:\n\n" + make_grid(["function", "part", "%"], tops, names=2)
        )
    return "\n\n".join(parts)


def _render_micro(micro: Mapping[str, Any]) -> str:
    rows = [
        [row["operation"], f"{row['ns']:,.0f}", f"{row['ns_min']:,.0f}-{row['ns_max']:,.0f}"] for row in micro["rows"]
    ]
    return (
        "## The compiled core alone\n\nNanoseconds per request, one thread, no sockets "
        f"(commit {micro['machine']['commit'] or 'unknown'}, {micro['machine']['date']}).\n\n"
        + make_grid(["operation", "ns", "min-max"], rows)
    )


def load(name: str) -> dict[str, Any] | None:
    """A stored result, or None when it was not measured."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the page with the results")
    options = parser.parse_args()
    peers = load("peers")
    if peers is None:
        print(f"no results in {RESULTS}: run 'make bench-peers' first", file=sys.stderr)
        return 1
    optimizer = load("optimizer")
    texts = {PAGE: render(peers, load("micro"), load("memory"), load("profile"), load("rollout"), optimizer)}
    texts |= {CHARTS / f"{name}.svg": text for name, text in draw_charts(peers).items()}
    if optimizer is not None:
        texts |= {CHARTS / f"{name}.svg": text for name, text in draw_optimizer(optimizer).items() if text}
    if options.check:
        stale = [path.name for path, text in texts.items() if not path.exists() or path.read_text("utf-8") != text]
        print(f"differs: {', '.join(stale)}: run benchmarks/report.py" if stale else "docs/benchmarks.md is current")
        return 1 if stale else 0
    CHARTS.mkdir(exist_ok=True)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
