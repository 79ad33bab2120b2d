"""What the benchmark reads, computes and renders, without any server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.goals import GOALS, Figures, Goal, divide
from benchmarks.machine import describe_machine
from benchmarks.peers.h2load import H2LoadRun, LoadFailed, parse_output
from benchmarks.peers.measure import Sample, summarise
from benchmarks.profiles.run import find_part, parse_report, unmangle
from benchmarks.report import compare, draw_charts, format_ratio, render, warn_if_noisy

SUMMARY = """\
starting benchmark...
Application protocol: h2c

finished in 1.23s, {rate} req/s, 2.41MB/s
requests: {total} total, {total} started, {done} done, {good} succeeded, {failed} failed, {errored} errored, 0 timeout
status codes: {ok} 2xx, {other} 3xx, 0 4xx, 0 5xx
traffic: 2.96MB (3103421) total, 390.63KB (400004) headers (space savings 86.75%), 595.70KB ({data}) data
                     min         max         mean         sd        +/- sd
time for request:       54us     10.33ms       781us       404us    90.11%
"""
GOOD = {"rate": "8123.45", "total": 10_000, "done": 10_000, "good": 10_000, "failed": 0, "errored": 0}
GOOD |= {"ok": 10_000, "other": 0, "data": 610_000}


def test_summary_is_read() -> None:
    run = parse_output(SUMMARY.format(**GOOD), cpu_s=0.5)
    assert run == H2LoadRun(requests=10_000, req_per_s=8123.45, data_bytes=610_000, cpu_s=0.5)
    assert run.wall_s == pytest.approx(1.231, rel=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"good": 9_999, "failed": 1},
        {"done": 9_999, "good": 9_999},
        {"good": 9_999, "errored": 1},
        {"ok": 9_000, "other": 1_000},
    ],
)
def test_run_with_any_failure_is_void(wrong: dict[str, int]) -> None:
    with pytest.raises(LoadFailed, match="not every request succeeded"):
        parse_output(SUMMARY.format(**(GOOD | wrong)))


@pytest.mark.parametrize("text", ["", "connection refused", SUMMARY.format(**GOOD).replace("traffic", "other")])
def test_output_without_a_summary_is_void(text: str) -> None:
    with pytest.raises(LoadFailed, match="no summary"):
        parse_output(text)


def make_sample(rate: float, cpu_s: float, other_cpu_s: float = 0.0) -> Sample:
    return Sample(H2LoadRun(requests=1_000, req_per_s=rate, data_bytes=0, cpu_s=0.01), cpu_s, other_cpu_s)


def test_median_run_is_reported_whole() -> None:
    row = summarise([make_sample(3_000, 0.30), make_sample(1_000, 0.10), make_sample(2_000, 0.25, 0.1)])
    assert (row["req_per_s"], row["req_per_s_min"], row["req_per_s_max"]) == (2_000, 1_000, 3_000)
    assert row["cpu_us_per_request"] == pytest.approx(250)
    assert row["server_cores"] == pytest.approx(0.5)
    assert row["req_per_s_per_core"] == pytest.approx(4_000)
    assert row["other_cores"] == pytest.approx(0.2)
    assert [run["req_per_s"] for run in row["runs"]] == [3_000, 1_000, 2_000]


def make_result(servers: dict[str, tuple[float, float]]) -> dict[str, Any]:
    rows = [
        {"contest": "identity", "connections": 8, "streams": 8, "server": name, "p50_us": 10.0, "p99_us": 20.0}
        | summarise([make_sample(rate, cpu_s)])
        for name, (rate, cpu_s) in servers.items()
    ]
    return {
        "machine": describe_machine(),
        "settings": {"runs": 1, "seconds": 1.0, "has_priority": True},
        "servers": {name: {"title": name.upper(), "settings": "plain"} for name in servers},
        "rows": rows,
        "contests": [{"name": "identity", "text": "Echoes.", "max_batch": 64, "row_bytes": 16}],
        "starts": [
            {"contest": "mlp", "server": name, "ready_s": 0.5, "rss_mb": 90.0, "pss_mb": 70.0, "processes": 1}
            for name in servers
        ],
        "ceilings": [],
        "void": [],
    }


def test_ratios_are_ours_divided_by_theirs_at_the_same_point() -> None:
    result = make_result({"aiorch": (9_000, 0.02), "triton": (3_000, 0.10)})
    # The same server at another point must not be compared with.
    result["rows"].append(result["rows"][0] | {"connections": 1, "streams": 1, "req_per_s": 1.0})
    ours, theirs, elsewhere = compare(result)
    assert ours.is_ours
    assert ours.rate_ratio is None
    assert theirs.rate_ratio == pytest.approx(3)
    assert theirs.core_ratio == pytest.approx(5)
    assert elsewhere.point == ("identity", "1x1")


def test_without_ours_there_are_no_ratios() -> None:
    (row,) = compare(make_result({"triton": (3_000, 0.10)}))
    assert row.rate_ratio is None
    assert row.cells()[-2:] == ["-", "-"]
    assert format_ratio(4.249) == "4.2x"


def test_page_shows_every_row_and_the_machine() -> None:
    result = make_result({"aiorch": (9_000, 0.02), "triton": (3_000, 0.10)})
    micro = {
        "machine": describe_machine(),
        "rows": [{"operation": "scan", "ns": 54.4, "ns_min": 53.0, "ns_max": 55.0}],
    }
    page = render(result, micro)
    assert "| 8x8 | TRITON | 3,000 ±0% |" in page
    assert "| 3.0x | 5.0x |" in page
    assert result["machine"]["cpu"] in page
    assert "| scan | 54 | 53-55 |" in page
    assert "compiled core" not in render(result)
    assert "- identity 1x1: lost" in render(result | {"void": ["identity 1x1: lost\nlog"]})


def test_page_shows_ceilings_bytes_and_starts() -> None:
    result = make_result({"aiorch": (9_000, 0.02), "triton": (3_000, 0.10)})
    result["ceilings"] = [{"contest": "identity", "batch": batch, "rows_per_s": 9_000.0 * batch} for batch in (1, 2)]
    page = render(result)
    assert "rows/s: 9,000 at batch 1, 18,000 at batch 2. AIOrchestrator's best point is 50% of the best." in page
    assert "| mlp | TRITON | 0.50 | 90 | 70 | 1 |" in page
    assert "Input MB/s" not in page
    result["contests"][0]["row_bytes"] = 602_112
    for row in result["rows"]:
        row["input_mb_per_s_per_core"] = 1234.4
    assert "Input MB/s per core: 8x8 AIORCH 1,234, 8x8 TRITON 1,234." in render(result)
    result["rows"] = []
    assert "No point of it counts." in render(result)


def test_charts_are_pictures_of_the_rows() -> None:
    result = make_result({"aiorch": (9_000, 0.02), "triton": (3_000, 0.10)})
    ((name, text),) = draw_charts(result).items()
    assert name == "identity"
    picture = ElementTree.fromstring(text)
    labels = ["".join(node.itertext()) for node in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert labels[1:] == ["8x8  AIORCH", "50,000", "8x8  TRITON", "10,000"]
    widths = [float(node.attrib["width"]) for node in picture.iter("{http://www.w3.org/2000/svg}rect")]
    assert widths[1] > widths[2]
    assert "(benchmarks/identity.svg)" in render(result)
    assert draw_charts(result | {"rows": []}) == {}


def test_page_shows_memory_and_profile() -> None:
    result = make_result({"aiorch": (9_000, 0.02)})
    samples = [{"requests": number * 100, "rss_mb": 90.0 + number, "pss_mb": 80.0} for number in range(1, 11)]
    memory = {"machine": describe_machine(), "text": "Echoes.", "growth_percent": 9.9, "samples": samples}
    point = {"name": "8x8", "groups": {"core": 60.0, "nghttp2": 40.0}}
    point["symbols"] = [{"percent": 12.34, "group": "core", "symbol": "wire.scan_request"}]
    page = render(result, None, memory, {"machine": describe_machine(), "workload": "identity", "points": [point]})
    assert "After 1,000 requests RSS differs by +9.9 % from that after 100" in page
    assert "| 1,000 | 100.0 | 80.0 |" in page
    assert "| memory after 5 million requests, against 100,000 | at most 5 % | 9.90 % | **no** |" in page
    assert "| nghttp2 | 40.0 |" in page
    assert "| wire.scan_request | core | 12.3 |" in page


def test_goals_tell_reached_missed_and_not_measured() -> None:
    figures = Figures(make_result({"aiorch": (9_000, 0.02), "triton": (3_000, 0.10)}))
    least = Goal("rate", lambda found: found.find("identity", "8x8", "aiorch", "req_per_s"), at_least=9_000, unit="/s")
    assert least.cells(figures) == ["rate", "at least 9000 /s", "9,000.0 /s", "yes"]
    most = Goal("ratio", lambda found: divide(found.best("identity", "8x8", "req_per_s"), 2_000), at_most=1.4)
    assert most.cells(figures) == ["ratio", "at most 1.4 x", "1.50 x", "**no**"]
    missing = Goal("none", lambda found: found.find("identity", "1x1", "aiorch", "req_per_s"), at_least=1)
    assert missing.cells(figures)[2:] == ["not measured", "-"]
    for goal in GOALS:
        assert (goal.at_least is None) != (goal.at_most is None)
        assert len(goal.cells(figures)) == 4


REPORT = """
# Overhead  Shared Object      Symbol
    19.56%  [kernel.kallsyms]  [k] finish_task_switch.isra.0
    10.00%  libnghttp2.so.14.24.1  [.] nghttp2_session_mem_recv
     7.50%  wire.cpython-311-x86_64-linux-gnu.so  [.] __pyx_f_13aiorch_server_5_core_4wire_scan_request
     0.50%  libc.so.6  [.] malloc
"""


def test_profile_is_read() -> None:
    rows = parse_report(REPORT, ["wire.cpython-311-x86_64-linux-gnu.so"])
    assert rows == [
        (19.56, "kernel: scheduling", "finish_task_switch.isra.0"),
        (10.0, "nghttp2", "nghttp2_session_mem_recv"),
        (7.5, "core", "wire.scan_request"),
        (0.5, "C library", "malloc"),
    ]


@pytest.mark.parametrize(
    ("binary", "symbol", "part"),
    [
        ("[kernel.kallsyms]", "tcp_sendmsg", "kernel: TCP"),
        ("[kernel.kallsyms]", "ep_poll_callback", "kernel: epoll and wake-ups"),
        ("[kernel.kallsyms]", "do_syscall_64", "kernel: the rest"),
        ("python3.11", "_PyEval_EvalFrameDefault", "Python"),
        ("libonnxruntime.so.1", "MlasGemm", "onnxruntime"),
        ("libssl.so.3", "SSL_read", "TLS"),
        ("_multiarray_umath.cpython-311-x86_64-linux-gnu.so", "array_new", "numpy"),
        ("uvloop.so", "run", "other"),
    ],
)
def test_functions_belong_to_parts(binary: str, symbol: str, part: str) -> None:
    assert find_part(binary, symbol, []) == part


def test_plain_names_stay_as_they_are() -> None:
    assert unmangle("nghttp2_session_send") == "nghttp2_session_send"
    assert unmangle("__pyx_f_13aiorch_server_5_core_10h2_request_take_header") == "h2_request.take_header"


def test_noise_is_told_and_quiet_is_not() -> None:
    result = make_result({"aiorch": (9_000, 0.02), "triton": (3_000, 0.10)})
    assert warn_if_noisy(result) == ""
    assert "not quiet" not in render(result)
    result["rows"][1]["other_cores"] = 0.5
    assert "in 1 of 2 rows" in warn_if_noisy(result)
    assert "not quiet" in render(result)


def test_machine_tells_no_paths_or_names() -> None:
    machine = describe_machine()
    assert machine["cpu"]
    assert machine["logical_cores"] >= 1
    assert len(machine["load_average"]) == 3
    assert str(Path.home()) not in str(machine)
