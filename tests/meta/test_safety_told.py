"""The figures on docs/safety.md are those that the last runs wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("safety_report", ROOT / "tests" / "sanitize" / "report.py")
assert _spec is not None and _spec.loader is not None
report = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(report)


def test_the_page_tells_what_the_last_runs_found() -> None:
    page = report.PAGE.read_text()
    assert report.render(page) == page, "docs/safety.md is not of these results: run tests/sanitize/report.py"


def test_a_typed_figure_is_noticed() -> None:
    page = report.PAGE.read_text()
    sqlite = report.read("tests/chaos/results.json")["sqlite"]
    rounds, kills = sqlite["rounds"], sqlite["kills"]
    typed = page.replace(f"| rounds, kills | {rounds}, {kills} |", f"| rounds, kills | {rounds}, {kills + 1} |")
    assert typed != page
    assert report.render(typed) == page


def test_a_page_without_a_place_for_figures_is_refused() -> None:
    page = report.PAGE.read_text().replace("<!-- kills: written by", "<!-- kills: typed by")
    with pytest.raises(ValueError, match="0 places for the figures of kills"):
        report.render(page)
