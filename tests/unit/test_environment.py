"""The simulated server for Gymnasium: its contract, what makes it the same again, and who does well in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorch_server import environment
from aiorch_server.environment import evaluate, learned, train
from aiorch_server.environment.batching import BatchingEnvironment
from aiorch_server.environment.evaluate import run_episode
from aiorch_server.environment.knobs import NAMES, SHAPE, Choice
from aiorch_server.environment.policies import POLICIES
from aiorch_server.environment.workload import KINDS, MOST_INSTANCES, Workload, draw_workload
from aiorch_server.optimizer.simulated import Machine

EPISODES = range(2_000_500, 2_000_506)


def play(seed: int, windows: int = 10) -> list[tuple[list[float], float, dict[str, object]]]:
    made = BatchingEnvironment(duration_s=10.0)
    made.reset(seed=seed)
    made.action_space.seed(seed)
    told = []
    for _ in range(windows):
        observation, reward, _, _, info = made.step(made.action_space.sample())
        told.append((observation.tolist(), float(reward), info))
    return told


def test_gymnasium_finds_nothing_wrong() -> None:
    check_env(gymnasium.make(environment.ID, duration_s=5.0).unwrapped)


def test_it_is_made_by_its_name_and_ends_in_time() -> None:
    made = gymnasium.make(environment.ID, duration_s=3.0, window_s=0.5, kind="step", cost=0.0)
    observation, info = made.reset(seed=1)
    assert observation.shape == (len(NAMES),)
    assert info["kind"] == "step"
    ends = [made.step(Choice().encode(info["target_us"]))[2:4] for _ in range(6)]
    assert ends == [(False, False)] * 5 + [(False, True)]


def test_the_same_seed_is_the_same_episode() -> None:
    assert play(7) == play(7)
    assert play(7) != play(8)


@given(st.integers(0, 2**32), st.sampled_from(KINDS))
@settings(max_examples=25, deadline=None)
def test_each_request_is_counted_once(seed: int, kind: str) -> None:
    made = BatchingEnvironment(duration_s=4.0, kind=kind)
    made.reset(seed=seed)
    made.action_space.seed(seed % 2**31)
    counts, rewards = dict.fromkeys(("arrivals", "in_time"), 0), 0.0
    for _ in range(4):
        observation, reward, _, _, info = made.step(made.action_space.sample())
        assert made.observation_space.contains(observation)
        counts = {name: counts[name] + info[name] for name in counts}
        rewards += float(reward) + made.workload.cost * made.choice.instances
        seen = made.seen
        lost = seen.refused_full + seen.refused_late + seen.dropped_late
        assert seen.arrivals == seen.answered + seen.failed + lost + seen.waiting + seen.running
        assert seen.answered == seen.in_time + seen.late == sum(seen.durations.values())
        assert sum(run.rows * run.executions for run in seen.runs) == seen.answered_rows
    assert counts["arrivals"] == np.count_nonzero(made.workload.times_ns <= 4e9)
    assert rewards == pytest.approx(counts["in_time"] / made.workload.rate)


def test_windows_change_nothing_in_what_happens() -> None:
    ended = []
    for window_s in (0.05, 1.0, 10.0):
        made = BatchingEnvironment(duration_s=10.0, window_s=window_s, kind="bursty")
        made.reset(seed=3)
        action = Choice(8, 0, 2, is_refusing=True).encode(made.workload.target_us)
        made.step(action)
        while made.seen.at_ns < 10 * 10**9:
            made.step(action)
        ended.append((made.seen.in_time, made.seen.late, made.seen.refused_late, made.seen.durations))
    assert ended[0] == ended[1] == ended[2]


def test_what_a_given_workload_must_bring() -> None:
    """One request every 20 ms and runs of 10 ms: each is alone, in time, and takes 10 ms."""
    times_ns = np.arange(0, 10**9, 20_000_000)
    machine = Machine([(1, 10_000_000), (32, 20_000_000)], 32, slowdowns=[1.0] * MOST_INSTANCES)
    work = Workload(machine, 15_000, "steady", 0.1, 0.1, 1.0, times_ns, np.ones(50, np.int64))
    made = BatchingEnvironment()
    made.reset(seed=1, options={"workload": work})
    observation, reward, _, is_over, info = made.step(Choice(4, 0, 2).encode(work.target_us))
    assert (info["arrivals"], info["in_time"], is_over) == (50, 50, True)
    assert reward == pytest.approx(1.0 - 2 * 0.1)
    seen = dict(zip(NAMES, observation.tolist(), strict=True))
    assert seen["part of time that instances are busy"] == pytest.approx(0.25)
    assert seen["p99 over the target, 0 without answers"] == pytest.approx(2 / 3, rel=0.07)
    assert seen["instances, in quarters"] == 0.5


@given(st.lists(st.integers(0, 200), min_size=4, max_size=4), st.integers(1000, 10**6))
def test_choices_come_back(numbers: list[int], target_us: int) -> None:
    action = np.array(numbers) % np.array(SHAPE)
    assert np.array_equal(Choice.decode(action, target_us).encode(target_us), action)


def test_what_is_no_action_or_no_episode() -> None:
    made = BatchingEnvironment()
    with pytest.raises(ValueError, match="begins with reset"):
        made.step(np.zeros(4, np.int64))
    made.reset(seed=1)
    with pytest.raises(ValueError, match="an action has 4 numbers"):
        made.step(np.array([32, 0, 0, 0]))
    for wrong in ({"window_s": 0.0}, {"duration_s": 0.5}, {"kind": "rare"}):
        with pytest.raises(ValueError, match=r"found|no kind"):
            BatchingEnvironment(**wrong)  # type: ignore[arg-type]


def test_kinds_and_costs_are_drawn_as_they_are_wished() -> None:
    random = np.random.default_rng(1)
    works = [draw_workload(random, 5.0, kind=kind, cost=0.5) for kind in KINDS]
    assert [work.kind for work in works] == list(KINDS)
    assert {work.cost for work in works} == {0.5}


def test_what_was_learnt_beats_no_batching_and_a_plain_queue() -> None:
    earned = {
        name: np.mean([run_episode(POLICIES[name](MOST_INSTANCES), seed, duration_s=20.0).earned for seed in EPISODES])
        for name in ("none", "greedy", "learned")
    }
    assert earned["learned"] > earned["none"] + 0.2
    assert earned["learned"] > earned["greedy"]


@pytest.mark.parametrize("name", list(POLICIES))
def test_each_policy_plays(name: str) -> None:
    score = run_episode(POLICIES[name](2), 501, duration_s=5.0)
    assert 0 <= score.in_time <= 1
    assert 1 <= score.instances <= MOST_INSTANCES
    assert run_episode(POLICIES[name](2), 501, duration_s=5.0) == score


def test_what_was_learnt_tells_where_it_comes_from(tmp_path: Path) -> None:
    told = json.loads(learned.FILE.read_text())
    assert told["command"].startswith("python -m aiorch_server.environment.train --seed")
    assert -1 < told["score"] < 1
    assert learned.FILE.stat().st_size < 20_000
    told["observation"] = told["observation"][1:]
    (tmp_path / "other.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="train it anew"):
        learned.read_network(tmp_path / "other.json")


def test_training_learns_something_and_the_same_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--seed", "5", "--generations", "1", "--population", "4", "--episodes", "1", "--checked", "1"]
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for file in files:
        train.main([*command, "--output", str(file)])
    assert files[0].read_text() == files[1].read_text()
    assert "episodes that it had not seen" in capsys.readouterr().out
    learned.read_network(files[0])


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(["--policies", "none,learned", "--episodes", "2", "--duration", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["policy", "---", "none", "learned"]
    with pytest.raises(SystemExit):
        evaluate.main(["--policies", "nobody"])


def test_without_gymnasium_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['gymnasium'] = None; import aiorch_server.environment"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install 'aiorchestrator[gym]'" in done.stderr
