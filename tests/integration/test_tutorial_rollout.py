"""docs/rollouts.md works as it stands: each of its commands is run, and shows what the page says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import ServerShell, Step, find_missing, read_page, run_page
from patience import PATIENCE

PAGE = Path(__file__).parents[2] / "docs" / "rollouts.md"
LIMIT_S = 60.0 * PATIENCE


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[ServerShell]:
    with ServerShell(tmp_path) as found:
        yield found


@pytest.mark.timeout(240 * PATIENCE)
def test_the_tutorial_works_as_it_stands(shell: ServerShell, tmp_path: Path) -> None:
    steps = [step for step in read_page(PAGE) if not step.text.startswith("pip install")]
    assert [step.name for step in steps if step.name] == ["train.py", "traffic.py", "history.py"]
    assert sum(not step.name for step in steps) > 8

    run_page(steps, shell, tmp_path, shell.change, limit_s=LIMIT_S)
    for name in ("server.log", "again.log"):
        log = (tmp_path / name).read_text()
        assert "serving:" in log and "Traceback" not in log and " ERROR " not in log, log
    told = (tmp_path / "traffic.log").read_text()
    assert "right" in told and "Error" not in told.partition("Traceback")[0], told


def test_what_a_page_shows_must_be_there() -> None:
    output = "digits -> 1: done (after 12.5 s)\nsecond   line 7\nthird"
    assert find_missing(["digits -> 1: done (after 99 s)", "", "third"], output) is None
    assert find_missing(["digits ... s)", "second line 7"], output) is None
    assert find_missing(["digits -> 2: done (after 99 s)"], output) == "digits -> 2: done (after 99 s)"
    assert find_missing(["third", "second line 7"], output) == "second line 7"
    assert find_missing(["second line 8"], output) == "second line 8"
    assert Step("x", shown=["error: no"]).fails
