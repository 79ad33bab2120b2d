"""The story in docs/tuning.md is the one that was recorded."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.scenarios.story import tell

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_tells_the_record() -> None:
    story = json.loads((ROOT / "benchmarks/results/story.json").read_text())
    assert tell(story) in (ROOT / "docs/tuning.md").read_text()
