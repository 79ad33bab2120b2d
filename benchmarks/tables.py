"""Tables of the page."""

from __future__ import annotations

from collections.abc import Sequence


def make_grid(header: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1, numbers: bool = True) -> str:
    """Markdown; all but the first ``names`` columns are aligned as numbers, unless there are none."""
    rules = ["---" if column < names or not numbers else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rules, *rows])
