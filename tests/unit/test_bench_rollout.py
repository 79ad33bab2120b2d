"""What the benchmark of rollouts makes of what it saw, without any server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.goals import GOALS, Figures
from benchmarks.machine import describe_machine
from benchmarks.rollout_figures import (
    count_misjudged,
    count_unfit,
    find_access_percent,
    find_p99_ratio,
    find_share_error,
    render_rollout,
)
from benchmarks.scenarios.frames import FrameReader, make_frame
from benchmarks.scenarios.paced import NUMBERS, STEP, WRONG, Log
from benchmarks.scenarios.rollout_canaries import find_worst_window
from benchmarks.scenarios.rollout_models import Fault, write_onnx, write_python
from benchmarks.scenarios.rollout_site import Load
from benchmarks.scenarios.rollout_swaps import Swap, choose, find_illegal, summarise

MS = 1_000_000
SWAPS = (Swap(1, 2, 1_000 * MS, 1_100 * MS), Swap(2, 3, 2_000 * MS, 2_100 * MS))


def make_load(*requests: tuple[int, int, int, int]) -> Load:
    """Requests by (sent, answered, version, code), times in milliseconds; they are due when they are sent."""
    sent, answered, version, code = (np.array(column, np.int64) for column in zip(*requests, strict=True))
    return Load(sent * MS, sent * MS, answered * MS, version, code, errors=(), has_precedence=True)


@pytest.mark.parametrize(
    ("request_", "is_legal"),
    [
        ((500, 501, 1, 0), True),
        ((500, 501, 2, 0), False),  # nobody had asked for version 2
        ((1_050, 1_051, 1, 0), True),  # during a swap both are
        ((1_050, 1_051, 2, 0), True),
        ((1_099, 1_500, 1, 0), True),  # sent to version 1 while that served
        ((1_101, 1_102, 1, 0), False),
        ((2_500, 2_501, 3, 0), True),
        ((2_500, 2_501, 2, 0), False),
        ((2_500, 2_501, 4, 0), False),  # there is none
        ((2_500, 2_501, 0, 0), False),
        ((2_500, 2_501, 0, 14), True),  # failed, and counted there
    ],
)
def test_an_answer_is_of_a_version_that_served(request_: tuple[int, int, int, int], is_legal: bool) -> None:
    assert find_illegal(make_load(request_), SWAPS) == (not is_legal)


def test_requests_belong_to_a_swap_or_to_the_time_between() -> None:
    load = make_load(
        (100, 101, 1, 0),  # warm-up
        (900, 901, 1, 0),
        (990, 1_010, 1, 0),  # begun before, ended within
        (1_050, 1_051, 2, 0),
        (1_140, 1_141, 2, 0),  # within the time that things take to settle
        (1_180, 1_181, 2, 0),  # neither
        (1_500, 1_501, 2, 0),
        (1_990, 0, 0, 0),  # lost
        (2_900, 2_901, 3, 0),  # after the last one
    )
    is_swap, is_steady = choose(load, SWAPS)
    assert is_swap.tolist() == [False, False, True, True, True, False, False, True, False]
    assert is_steady.tolist() == [False, True, False, False, False, False, True, False, False]
    found = summarise(load, SWAPS, 2000.0)
    assert (found["failed"], found["lost"], found["swaps"]) == (0, 1, 2)
    assert found["steady"]["p99_us"] == pytest.approx(1000)
    assert found["during"]["max_us"] == pytest.approx(20_000)


def test_the_worst_window_is_found() -> None:
    is_canary = np.zeros(50, np.bool_)
    is_canary[10:13] = True
    assert find_worst_window(is_canary, 5) == (0, 3)
    assert find_worst_window(np.arange(100) % 10 == 0, 10) == (1, 1)


def test_answers_tell_their_request_and_version() -> None:
    from aiorch_proto.v2 import inference_pb2 as pb

    log = Log()
    numbers = [log.open(0) for _ in range(4)]
    for number, (version, value) in zip(numbers, [(7, 7), (7, 8), (7, STEP + 7), (2, 3 * STEP + 2)], strict=True):
        answer = pb.ModelInferResponse(model_version=str(version))
        answer.raw_output_contents.append(np.full(4, value, np.float32).tobytes())
        log.judge(number, answer.SerializeToString())
    assert log.codes.tolist() == [0, WRONG, WRONG, 0]
    assert log.versions.tolist() == [7, 7, 7, 2]
    assert np.float32(NUMBERS * STEP + STEP - 1) == NUMBERS * STEP + STEP - 1


def test_frames_come_in_pieces() -> None:
    sent = make_frame(0, 1, 5, b"abc") + make_frame(8, 0, 0, b"")
    reader = FrameReader()
    assert [list(reader.read(sent[:10])), list(reader.read(sent[10:]))] == [[], [(0, 1, 5, b"abc"), (8, 0, 0, b"")]]


def test_versions_add_their_number_and_have_their_fault(tmp_path: Path) -> None:
    import onnxruntime

    folder = write_onnx(tmp_path / "onnx", 9)
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"INPUT0": rows})[0], rows + 9)

    def ask(fault: Fault, rows: Any) -> Any:
        code: dict[str, Any] = {}
        exec((write_python(tmp_path / f"{fault}", 9, fault) / "model.py").read_text(), code)
        return code["Model"]().execute({"INPUT0": rows})["OUTPUT0"]

    five = np.repeat(np.arange(5, dtype=np.float32) * STEP, 4).reshape(5, 4)
    assert np.array_equal(ask(Fault.NONE, five), five + 9)
    assert np.array_equal(ask(Fault.SLOW, five), five + 9)
    assert (ask(Fault.DIFFERING, five) != five + 9).any(axis=1).tolist() == [False, True, False, False, False]
    with pytest.raises(ValueError, match="gave up"):
        ask(Fault.ERRING, five)


def make_rollout() -> dict[str, Any]:
    load = make_load((900, 901, 1, 0), (1_050, 1_053, 2, 0), (1_500, 1_501, 2, 0), (2_050, 2_051, 3, 14))
    weights = {"percent": 10.0, "requests": 1_000, "failed": 0, "lost": 0, "reached_percent": 10.2, "window": 100}
    weights |= {"window_min_percent": 9.0, "window_max_percent": 11.0}
    canary = {"kind": "slow", "state": "rolled-back", "is_right": True, "reason": "its p99 is 9 ms", "bake_s": 6.0}
    canary |= {"decided_s": 0.5, "ended_s": 0.6, "stable_failed": 0, "lost": 0}
    cpu_us = {("nothing", "indexed", False): 10.0, ("token", "indexed", True): 10.3, ("token", "whole", False): 11.0}
    cpu_us |= {("token", "whole", True): 11.11}
    access = {"connections": 32, "requests": 100, "turns": 3, "token_bytes": 1024}
    access["rows"] = [  # type: ignore[assignment]
        {"shows": shows, "sent": sent, "is_asked": is_asked, "cpu_us": us, "turns_us": [us]}
        for (shows, sent, is_asked), us in cpu_us.items()
    ]
    parts = {"swaps": summarise(load, SWAPS, 2000.0), "weights": weights, "canaries": [canary], "access": access}
    return {"schema": 1} | {name: {"machine": describe_machine(), "found": found} for name, found in parts.items()}


def test_figures_and_their_goals() -> None:
    rollout = make_rollout()
    assert count_unfit(rollout) == 1
    assert find_p99_ratio(rollout) == pytest.approx(3.0)
    assert find_share_error(rollout) == pytest.approx(0.2)
    assert count_misjudged(rollout) == 0
    assert find_access_percent(rollout, "token", "indexed", "nothing") == pytest.approx(3.0)
    assert find_access_percent(rollout, "token", "whole", "token") == pytest.approx(1.0)
    rollout["canaries"]["found"][0]["stable_failed"] = 1
    assert count_misjudged(rollout) == 1
    figures = Figures({"rows": [], "starts": [], "ceilings": []}, None, rollout)
    told = {goal.what: goal.cells(figures)[2:] for goal in GOALS}
    assert told["p99 during a swap, against between swaps"] == ["3.00 x", "**no**"]
    assert told["the same, with `--scheduling realtime`"][-1] not in ("yes", "**no**")
    assert told["share of a 10 % canary, off by"] == ["0.20 %", "yes"]


def test_the_section_shows_what_was_measured_and_nothing_else() -> None:
    page = render_rollout(make_rollout())
    assert "Of 4 requests 1 failed, 0 were lost, 0 were answered by a version" in page
    assert "| during a swap | 2 | 3,000 |" in page
    assert "Swaps with precedence" not in page
    assert "10.200 % of 1,000 requests" in page
    assert "| slow | rolled-back | 0.50 | 0.60 | 6 | 0 | its p99 is 9 ms |" in page
    assert "| token | whole | 11.11 | 10.00 | +11.1 % | 11.00 | +1.0 % |" in page
    both = make_rollout()
    both["swaps-realtime"] = both["swaps"]
    assert find_p99_ratio(both, "swaps-realtime") == pytest.approx(3.0)
    assert "The same 2 times with `--scheduling realtime`" in render_rollout(both)
    only = {"weights": make_rollout()["weights"]}
    assert "Swaps" not in render_rollout(only) and "canary of 10 %" in render_rollout(only)
    assert count_unfit(only) is None and find_access_percent(only, "token", "indexed", "nothing") is None
