"""Writes the last figures of the sanitizers, the fuzzers, the leak run and the kills into ``docs/safety.md``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "safety.md"

FIGURES = ("findings", "seconds", "commit", "compiler", "date")


def read(path: str) -> dict[str, Any]:
    file = ROOT / path
    return dict(json.loads(file.read_text())) if file.exists() else {}


def make_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def show_sanitizers() -> str:
    rows = [
        (kind, f"`{path}`", re.sub(r" in [\d.]+s.*", "", row["tests"]), *(row.get(key, "") for key in FIGURES))
        for kind, paths in read("tests/sanitize/results.json").items()
        for path, row in paths.items()
    ]
    return make_table(("sanitizer", "folder", "tests", *FIGURES), rows)


def show_fuzzing() -> str:
    rows = [
        (
            f"`{name}`",
            f"{row['executions']:,}",
            f"{row['seconds'] / 60:.0f}",
            row["coverage"],
            row["findings"],
            row["date"],
        )
        for name, row in read("tests/fuzz/results.json").items()
    ]
    return make_table(("target", "executions", "minutes", "edges covered", "findings", "date"), rows)


def show_leaks() -> str:
    results = read("tests/core/leaks/results.json")
    rows = [(key, f"{row['before']:,.0f}", f"{row['after']:,.0f}") for key, row in results.get("figures", {}).items()]
    caption = f"{results.get('rounds')} rounds in {results.get('seconds'):.0f} s on {results.get('date')}:"
    return f"{caption}\n\n{make_table(('what', 'before', 'after'), rows)}"


def show_kills() -> str:
    results = read("tests/chaos/results.json")
    parts = [results[kind] for kind in ("sqlite", "postgresql")]
    rows = [
        (title, *(", ".join(f"{part[name]:,}" for name in names) for part in parts))
        for title, names in (
            ("rounds, kills", ("rounds", "kills")),
            ("changes acknowledged, of these at a repetition", ("acknowledged", "acknowledged_on_repeat")),
            ("changes cut off, of these made all the same", ("unacknowledged", "made_unanswered")),
            ("requests answered, wrong, failed", ("requests_answered", "requests_wrong", "requests_failed")),
            ("a server's start, median and longest, s", ("median_start_s", "longest_start_s")),
        )
    ]
    rows.append(("longest time without a driver of rollouts, s", "", f"{parts[1]['longest_takeover_s']:,}"))
    table = make_table((f"seed {results['seed']}", "SQLite, one server", "PostgreSQL, two servers"), rows)
    stop, disk = results["stop"], results["disk"]
    return (
        f"{table}\n\nWhile PostgreSQL stood still for {stop['stopped_s']:g} s, "
        f"{stop['requests_answered_meanwhile']:,} requests were answered and {stop['requests_failed']} failed; "
        f"{stop['changes_refused']} changes were refused, each within {stop['longest_refusal_s']:g} s. "
        f"With a full disk {disk['refused']} uploads were refused, {disk['requests_answered']:,} requests answered, "
        f"and {disk['requests_failed']} failed."
    )


def render(text: str) -> str:
    """The page with the last figures in their places."""
    for name, show in (
        ("sanitizers", show_sanitizers),
        ("fuzzing", show_fuzzing),
        ("leaks", show_leaks),
        ("kills", show_kills),
    ):
        figures = show().replace("\\", r"\\")  # text, not a reference to a group
        pattern = rf"(<!-- {name}: written by tests/sanitize/report.py -->\n).*?(<!-- end -->)"
        text, places = re.subn(pattern, rf"\g<1>{figures}\n\g<2>", text, flags=re.S)
        if places != 1:
            raise ValueError(f"{PAGE.name} has {places} places for the figures of {name}, expected 1")
    return text


def main() -> None:
    PAGE.write_text(render(PAGE.read_text()))


if __name__ == "__main__":
    main()
