"""Writes the last figures of the sanitizers, the fuzzers and the leak run into ``docs/safety.md``."""

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


def main() -> None:
    text = PAGE.read_text()
    for name, show in (("sanitizers", show_sanitizers), ("fuzzing", show_fuzzing), ("leaks", show_leaks)):
        pattern = rf"(<!-- {name}: written by tests/sanitize/report.py -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, show=show: f"{found[1]}{show()}\n{found[2]}", text, flags=re.S)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
