"""``aiorch tune`` on a real model: what it finds holds, its page says what its JSON says, and its errors say why."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from aiorch_server.cli import build_app
from aiorch_server.optimizer.arrivals import Trace

APP = build_app()
#: Every batch takes 10 ms, whatever its size.
MODEL = """
backend: "identity"
max_batch_size: 8
input [ { name: "X" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [ { name: "Y" data_type: TYPE_FP32 dims: [ 1 ] } ]
parameters { key: "execute_delay_us" value { string_value: "10000" } }
"""


class Page(HTMLParser):
    """The document that a page carries, the cells of its tables, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.document = ""
        self.tables: list[list[list[str]]] = []
        self.loads: list[str] = []
        self.plots = 0
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.plots += tag == "svg"
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag == "script":
            self.document += data
        elif self._tag in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "slow" / "1").mkdir(parents=True)
    (folder / "slow" / "config.pbtxt").write_text(MODEL)
    return folder


def run(repository: Path, report: Path, *arguments: object, model: str = "slow") -> Any:
    places = ["--repository", str(repository), "--report", str(report)]
    return CliRunner().invoke(APP, ["tune", model, *places, *map(str, arguments)])


def test_what_is_found_holds(repository: Path, tmp_path: Path) -> None:
    times_ns = np.cumsum(np.random.default_rng(0).exponential(1e9 / 150, 300)).astype(np.int64)
    Trace(times_ns, np.ones_like(times_ns)).save(tmp_path / "trace.npz")
    traffic = ["--trace", tmp_path / "trace.npz", "--seconds", 4, "--json"]
    result = run(repository, tmp_path / "report", "--slo", "p95=60ms, instances=1", *traffic)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)["tuning"]
    assert document["is_met"] and document["verdict"].endswith("did on the real model")
    # one request at a time would take 10 ms of each 6.7 ms
    assert document["chosen"]["max_batch_size"] > 1 and document["chosen"]["instances"] == 1
    for size in document["curve"]:
        assert size["ms"] == pytest.approx(10.5, rel=0.2)
    assert all(each["verified_good"] >= 0.95 for each in document["verified"] if each["is_kept"])
    assert document["one_more_instance"]["growth"] > document["chosen"]["growth"] > 1
    assert "max_batch_size=" in document["config"] and "count: 1" in document["config"]

    assert json.loads((tmp_path / "report.json").read_text()) == document
    page = Page((tmp_path / "report.html").read_text())
    assert json.loads(page.document) == document
    assert not page.loads and page.plots == 2
    for table, name in zip(page.tables, ("verified", "frontier", "candidates"), strict=True):
        assert [[tell(value) for value in each.values()] for each in document[name]] == table[1:], name


def tell(value: object) -> str:
    return {True: "yes", False: "no", None: ""}[value] if isinstance(value, bool | None) else str(value)


def test_a_target_out_of_reach_is_told_with_the_best_there_is(repository: Path, tmp_path: Path) -> None:
    result = run(repository, tmp_path / "r", "--slo", "p99=5ms", "--rate", 40, "--burst", 3, "--seconds", 2)
    assert result.exit_code == 1
    assert "no setting keeps 99 % of answers within 5 ms" in result.stderr and "the best reachable is" in result.stderr
    assert json.loads((tmp_path / "r.json").read_text())["is_met"] is False


@pytest.mark.parametrize(
    ("model", "arguments", "said"),
    [
        ("slow", ["--slo", "50ms", "--rate", 10], "--slo: found '50ms'"),
        ("slow", ["--slo", "priority=1", "--rate", 10], "names no latency"),
        ("slow", ["--slo", "p99=50ms"], "--trace FILE or --rate N"),
        ("slow", ["--slo", "p99=50ms", "--trace", "empty.csv"], "holds 0 requests"),
        ("slow", ["--slo", "p99=50ms", "--trace", "other.csv"], "names the columns time_s and rows"),
        ("slow", ["--slo", "p99=50ms", "--trace", "none.npz"], "cannot be read"),
        ("slow", ["--slo", "p99=50ms", "--trace", "broken.npz"], "broken.npz"),
        ("slow", ["--slo", "p99=50ms", "--trace", "large.csv", "--seconds", 2], "'slow' takes at most 8"),
        ("slw", ["--slo", "p99=50ms", "--rate", 10], "did you mean 'slow'?"),
    ],
)
def test_what_is_wrong_is_said(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, arguments: list[object], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.csv").write_text("time_s,rows\n")
    Path("other.csv").write_text("a,b\n1,2\n")
    Path("broken.npz").write_bytes(b"PK\x03\x04 not really")
    Path("large.csv").write_text("time_s,rows\n0.0,1\n0.5,9\n")
    result = run(repository, tmp_path / "report", *arguments, model=model)
    assert result.exit_code == 2, result.output
    assert said in result.stderr.replace("\n", " ")
    assert not (tmp_path / "report.html").exists()
