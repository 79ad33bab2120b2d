"""The probe of the compiled core builds against its headers, and its times are those of real answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_step_is_timed(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "micro" / "run.py"), "--requests", "2000", "--runs", "1"]
    command += ["--cache", str(tmp_path), "--output", str(tmp_path / "micro.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    rows = {row["operation"]: row["ns"] for row in json.loads((tmp_path / "micro.json").read_text())["rows"]}
    for size in (1, 8, 64):
        steps = [rows[f"{step}, batch {size}"] for step in ("dispatch", "take", "gather", "settle", "drain")]
        assert min(steps) > 0
        assert rows[f"all steps, batch {size}"] >= max(steps)
    assert 0 < rows["scan"] < rows["dispatch, batch 1"]
