"""docs/model-configuration.md says of each field what the code does with it."""

from __future__ import annotations

import runpy
from pathlib import Path

from aiorch_server.config.support import NO_EFFECT, REFUSED

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_is_that_of_the_code() -> None:
    written = runpy.run_path(str(DOCS / "write_model_configuration.py"))
    page = (DOCS / "model-configuration.md").read_text()
    assert page == written["render"](page), "run docs/write_model_configuration.py"
    told = page.count("| refused |") + page.count("; refused:"), page.count("| no effect |")
    assert told == (len(REFUSED), len(NO_EFFECT))
