"""docs/security.md shows the table of permissions as it is."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_shows_the_table_of_permissions() -> None:
    written = runpy.run_path(str(DOCS / "write_permissions.py"))
    page = (DOCS / "security.md").read_text()
    assert page == written["write_page"](page), "run docs/write_permissions.py"
    assert page.count("| `/inference.GRPCInferenceService/") == 20
