"""docs/operations.md: its backups work as they stand, of a server that runs and is told more meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from databases import new_database
from pages import ServerShell, read_page, run_page
from patience import PATIENCE

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
LIMIT_S = 60.0 * PATIENCE
CONFIG = """
backend: "identity"
max_batch_size: 8
input { name: "INPUT0" data_type: TYPE_FP32 dims: [-1] }
output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [-1] }
"""


class Operator:
    """Somebody at a shell in the server's folder."""

    def __init__(self, shell: ServerShell, folder: Path) -> None:
        self._shell = shell
        self._folder = folder

    def do(self, line: str, *, code: int = 0) -> str:
        found, shown = self._shell.run(line, LIMIT_S)
        assert found == code, shown
        return shown

    def start(self, name: str) -> None:
        self.do(f"aiorch serve > {name}.log 2>&1 & server=$!")
        self.do(f"until grep -q serving: {name}.log || ! kill -0 $server; do sleep 0.1; done")
        assert "serving:" in (log := (self._folder / f"{name}.log").read_text()), log

    def stop(self) -> None:
        self.do("kill $server; wait $server")

    def push(self, model: str, label: str) -> None:
        """A version that is not like another."""
        made = self._folder / "made"
        made.mkdir(exist_ok=True)
        (made / "config.pbtxt").write_text(CONFIG)
        (made / "labels.txt").write_text(label)
        self.do(f"aiorch model push {model} made")

    def infer(self) -> str:
        (self._folder / "row.json").write_text('{"INPUT0": [[1.5, 2.5]]}')
        return self.do("aiorch infer echo --input row.json --json")


@pytest.mark.timeout(240 * PATIENCE)
@pytest.mark.parametrize(("section", "kind"), [("With SQLite", "sqlite"), ("With PostgreSQL", "postgresql")])
def test_a_backup_brings_back_what_was_there(section: str, kind: str, tmp_path: Path) -> None:
    back_up, *restore = read_page(PAGE, section)
    assert restore
    url = new_database(kind, tmp_path) if kind == "postgresql" else "sqlite:///aiorch.db"
    with ServerShell(tmp_path, AIORCH_REGISTRY_URL=url) as shell:
        operator = Operator(shell, tmp_path)
        operator.start("first")
        operator.push("echo", "one")
        operator.do("aiorch deploy echo --wait")
        operator.push("echo", "two")
        lines = back_up.text.splitlines()
        for number, line in enumerate(lines):
            operator.do(line)
            operator.push("echo", f"while it was made, {number}")  # before, between and behind the copies
        known = operator.do("aiorch model show echo")
        operator.do("aiorch undeploy echo")
        operator.stop()
        for folder in ("artefacts", "artefacts-cache"):
            shutil.rmtree(tmp_path / folder)
        if kind == "postgresql":
            operator.do('psql --quiet "$AIORCH_REGISTRY_URL" --command="DROP TABLE audit, events"')
        run_page(restore, shell, tmp_path, shell.change, limit_s=LIMIT_S)
        operator.start("second")
        assert "1.5" in operator.infer()  # it is deployed again, and its files are there
        found = operator.do("aiorch model show echo").splitlines()
        assert 2 + 2 <= len(found) < len(known.splitlines()), found
        for line in found[2:]:  # every version that the database knows has its files
            version = line.split()[0]
            operator.do(f"aiorch deploy echo:{version} --wait")
        assert "unbroken" in operator.do("aiorch audit verify")
        operator.stop()
