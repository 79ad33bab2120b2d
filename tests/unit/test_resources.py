"""Resources that instances share: bounds, turns, what is refused, and a whole server whose models share one."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from running_site import Site
from tritonclient.utils import InferenceServerException

from aiorch_server.config.placement import RateLimiter
from aiorch_server.errors import ModelLoadError
from aiorch_server.execution.resources import Claim, ResourceLimit, ResourcePool


def make(priority: int = 0, *, is_global: bool = True, **counts: int) -> RateLimiter:
    resources = [{"name": name, "global": is_global, "count": count} for name, count in counts.items()]
    return RateLimiter.model_validate({"resources": resources, "priority": priority})


class Holding:
    """A thread that holds a claim until it is told to let go."""

    def __init__(self, pool: ResourcePool, claim: Claim, turns: list[Claim]) -> None:
        self.has_it, self.release = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(pool, claim, turns), daemon=True)
        self._thread.start()

    def _run(self, pool: ResourcePool, claim: Claim, turns: list[Claim]) -> None:
        with pool.hold(claim):
            turns.append(claim)
            self.has_it.set()
            assert self.release.wait(20)

    def end(self) -> None:
        self.release.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(10_000):
        if condition():
            return
        pause.wait(0.002)
    raise AssertionError("did not come")


def test_nobody_holds_more_than_there_is() -> None:
    pool = ResourcePool([ResourceLimit.parse("R:3")])
    held, most, failed = {"R": 0, "S": 0}, {"R": 0, "S": 0}, []
    lock = threading.Lock()

    def run(claim: Claim, needs: dict[str, int]) -> None:
        for _ in range(200):
            with pool.hold(claim):
                with lock:
                    for name, count in needs.items():
                        held[name] += count
                        most[name] = max(most[name], held[name])
                with lock:
                    for name, count in needs.items():
                        held[name] -= count
        failed.remove(claim)

    threads = []
    for needs in ({"R": 1}, {"R": 2}, {"R": 3}, {"R": 1, "S": 2}, {"S": 1}, {"S": 2, "R": 2}):
        claim = pool.add(make(**needs), "cpu")
        failed.append(claim)
        threads.append(threading.Thread(target=run, args=(claim, needs), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failed
    assert most["R"] <= 3
    assert most["S"] <= 2  # as much as the most demanding needs
    assert set(pool.read_taken().values()) == {0}


def test_turns_go_by_priority() -> None:
    """Of three that always want it, the one with priority 4 gets a quarter of the turns of the others."""
    pool = ResourcePool()
    claims = [pool.add(make(priority, R=1), "cpu") for priority in (1, 1, 4)]
    turns: list[Claim] = []
    holding = {claims[0]: Holding(pool, claims[0], turns)}
    wait_until(lambda: len(turns) == 1)
    holding |= {claim: Holding(pool, claim, turns) for claim in claims[1:]}
    for count in range(1, 37):
        wait_until(lambda count=count: len(turns) == count and len(pool._waiting) == 2)  # type: ignore[misc]
        holder = turns[-1]
        holding[holder].end()
        holding[holder] = Holding(pool, holder, turns)
    for each in holding.values():
        each.release.set()
    for each in holding.values():
        each.end()
    counts = [turns[:36].count(claim) for claim in claims]
    assert abs(counts[0] - counts[1]) <= 2
    assert 3 <= counts[2] <= 5
    assert set(pool.read_taken().values()) == {0}


def test_the_order_is_by_turn_and_big_needs_are_not_overtaken_for_ever() -> None:
    pool = ResourcePool([ResourceLimit.parse("R:2")])
    small, big, late = pool.add(make(R=1), "cpu"), pool.add(make(R=2), "cpu"), pool.add(make(R=1), "cpu")
    turns: list[Claim] = []
    first = Holding(pool, small, turns)
    assert first.has_it.wait(20)
    second = Holding(pool, big, turns)
    wait_until(lambda: len(pool._waiting) == 1)
    third = Holding(pool, late, turns)
    wait_until(lambda: len(pool._waiting) == 2)  # there is one R left, but the big one comes first
    first.end()
    assert second.has_it.wait(20)
    assert not third.has_it.is_set()
    second.end()
    third.end()
    assert turns == [small, big, late]


def test_devices_have_their_own() -> None:
    pool = ResourcePool([ResourceLimit.parse("R:1"), ResourceLimit.parse("R:2:0")])
    pool.add(make(is_global=False, R=2), "cuda:0")
    with pytest.raises(ModelLoadError, match="resource 'R': found count 2, the server has 1 on cuda:1"):
        pool.add(make(is_global=False, R=2), "cuda:1")
    with pytest.raises(ModelLoadError, match="found count 2, the server has 1; see --rate-limit-resource"):
        pool.add(make(R=2), "cuda:0")


#: Tells how many models of this process run at once at most; waits for a second one for a while.
MODEL = """
import sys, threading, time
shared = sys.__dict__.setdefault("_aiorch_test_meeting", {"lock": threading.Lock(), "now": 0, "most": 0})
class Model:
    inputs, outputs, max_batch_size = [("X", "FP32", [1])], [("Y", "FP32", [1])], 0
    def execute(self, inputs):
        with shared["lock"]:
            shared["now"] += 1
            shared["most"] = max(shared["most"], shared["now"])
        until = time.monotonic() + (5 if inputs["X"][0] else 0)
        while time.monotonic() < until and shared["most"] < inputs["X"][0]:
            time.sleep(0.001)
        if not inputs["X"][0]:
            time.sleep(0.005)
        with shared["lock"]:
            shared["now"] -= 1
        return {"Y": inputs["X"] * 0 + shared["most"]}
"""


def write_model(root: Path, name: str, group: str) -> None:
    (root / name / "1").mkdir(parents=True)
    (root / name / "1" / "model.py").write_text(MODEL)
    (root / name / "config.pbtxt").write_text(f'backend: "python" max_batch_size: 0 instance_group {{ {group} }}')


LIMIT = 'rate_limiter { resources { name: "R" global: true count: 1 } }'


@pytest.fixture
def open_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    opened: list[Site] = []

    def make_site(*resources: str, **groups: str) -> Site:
        for name, group in groups.items():
            write_model(tmp_path, name, group)
        opened.append(
            Site(
                tmp_path,
                io_threads=1,
                execution={"backends": ["aiorch_backends.python:PythonBackend"], "resources": resources},
            )
        )
        return opened[-1]

    before = set(sys.modules)
    yield make_site
    for each in opened:
        each.close()
    # the backend keeps what it has opened for a load that never came
    for name in set(sys.modules) - before:
        if name.startswith("aiorch_models_"):
            sys.modules.pop(name)


def ask(site: Site, models: list[str], value: float) -> Any:
    found: list[Any] = []
    done = threading.Semaphore(0)

    def keep(result: Any, error: Any) -> None:
        found.append(error or float(result.as_numpy("Y")[0]))
        done.release()

    tensor = grpc_client.InferInput("X", [1], "FP32")
    tensor.set_data_from_numpy(np.array([value], np.float32))
    with grpc_client.InferenceServerClient(site.target) as client:
        for model in models:
            client.async_infer(model, [tensor], keep)
        for _ in models:
            assert done.acquire(timeout=30)
    return max(found)


def reset() -> None:
    import sys

    sys.__dict__.pop("_aiorch_test_meeting", None)


def test_models_that_share_a_resource_run_one_at_a_time(open_site: Callable[..., Site]) -> None:
    reset()
    site = open_site(one=f"count: 2 {LIMIT}", two=LIMIT)
    assert ask(site, ["one", "two"] * 20, 0) == 1
    with grpc_client.InferenceServerClient(site.target) as client:
        config = client.get_model_config("two").config.instance_group[0].rate_limiter
        assert [(each.name, getattr(each, "global"), each.count) for each in config.resources] == [("R", True, 1)]


def test_more_of_it_lets_more_run(open_site: Callable[..., Site]) -> None:
    """The same models meet where there are two; this also shows that the test above can fail."""
    reset()
    site = open_site("R:2", one=LIMIT, two=LIMIT)
    assert ask(site, ["one", "two"], 2) == 2


def test_a_need_that_can_never_be_met_fails_the_load(open_site: Callable[..., Site]) -> None:
    reset()
    site = open_site("R:1", one=LIMIT.replace("count: 1", "count: 2"))
    with grpc_client.InferenceServerClient(site.target) as client:
        (entry,) = client.get_model_repository_index().models
        assert "resource 'R': found count 2, the server has 1" in entry.reason
    assert isinstance(ask(site, ["one"], 0), InferenceServerException)


#: Passes its input on to the model that its name is followed by: "a_b" calls "b"; "b" answers.
CALLER = """
from aiorch_backends.python.calling import call
class Model:
    inputs, outputs, max_batch_size = [("X", "FP32", [1])], [("Y", "FP32", [1])], 0
    def load(self, context):
        self.context = context
    def execute(self, inputs):
        _, _, to = self.context.model_name.partition("_")
        if not to or inputs["X"][0] == 0:  # the run before it serves
            return {"Y": inputs["X"] + 1}
        return {"Y": call(self.context, to, {"X": inputs["X"]}, timeout_s=TIMEOUT)["Y"]}
"""
CALLS_TIMEOUT_S = 30


def write_callers(root: Path, **groups: str) -> Path:
    for name, group in groups.items():
        write_model(root, name, group)
        (root / name / "1" / "model.py").write_text(CALLER.replace("TIMEOUT", str(CALLS_TIMEOUT_S)))
    return root


@pytest.mark.parametrize(
    ("groups", "path"),
    [
        ({"b": LIMIT, "a_b": LIMIT}, "a_b -> b"),
        # through a model that needs nothing
        ({"b": LIMIT, "x_b": "count: 1", "a_x_b": LIMIT}, "a_x_b -> x_b -> b"),
        # one that is called may stay within what there is alone, not with what its caller holds
        ({"b": LIMIT.replace("count: 1", "count: 2"), "a_b": LIMIT}, "a_b -> b"),
    ],
)
def test_a_call_that_would_wait_for_its_own_caller_is_refused_at_once(
    tmp_path: Path, groups: dict[str, str], path: str
) -> None:
    site = open_callers(tmp_path, "R:2" if "2" in groups["b"] else "R:1", groups)
    try:
        first = path.split()[0]
        start = time.monotonic()
        error = ask(site, [first], 1)
        assert isinstance(error, InferenceServerException)
        assert time.monotonic() - start < CALLS_TIMEOUT_S / 2
        assert f"model 'b' cannot be called here, {path}: it needs" in str(error)
        assert "of resource 'R', of which the server has" in str(error)
        assert ask(site, ["b"], 1) == 2  # everything was given back
    finally:
        site.close()


def open_callers(root: Path, resource: str, groups: dict[str, str]) -> Site:
    backends = ["aiorch_backends.python:PythonBackend"]
    write_callers(root, **groups)
    return Site(root, io_threads=1, execution={"backends": backends, "resources": [resource]})


def test_a_call_that_finds_enough_of_it_is_answered(tmp_path: Path) -> None:
    site = open_callers(tmp_path, "R:2", {"b": LIMIT, "a_b": LIMIT})
    try:
        assert ask(site, ["a_b"] * 4, 1) == 2
    finally:
        site.close()
