"""Shares of versions at the native door: what each of many requests got."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from burst import Burst
from http2_peer import prefixed
from running_site import Site, encode_values
from share_model import ShareModel, find_worst_window

from aiorch_server._core import encode_request
from aiorch_server.routing import Replay, Sample, Share, Traffic

CANARY = (Share(1, 9_000), Share(2, 1_000))
HALF = (Share(1, 5_000), Share(2, 5_000))
WIDE = 40_000  # numbers in a row that is placed while it comes in

CONFIG = """
backend: "identity" max_batch_size: 64
input { name: "INPUT0" data_type: TYPE_FP32 dims: [-1] }
output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [-1] }
version_policy { all {} }
"""


def write_versions(root: Path, name: str = "identity", versions: int = 3, config: str = CONFIG) -> Path:
    for version in range(1, versions + 1):
        (root / name / str(version)).mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(config)
    return root


@pytest.fixture(scope="module", params=[0, 1, 2], ids=lambda threads: f"io_threads={threads}")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(write_versions(tmp_path_factory.mktemp("models")), io_threads=request.param)
    yield site
    site.close()


@pytest.fixture(autouse=True)
def as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "site" in request.fixturenames:
        set_traffic(request.getfixturevalue("site"), None)


def set_traffic(site: Site, traffic: Traffic | None, model: str = "identity") -> None:
    async def change() -> None:
        site.application.manager.set_traffic(model, traffic)

    site.run(change())


def count_answered(site: Site, model: str = "identity") -> Counter[int]:
    """Requests that each version has answered."""
    servables = [each for each in site.application.manager.servables() if each.name == model]
    return Counter({each.version: each.statistics().success.count for each in servables})


def test_each_thousand_of_100_000_has_its_share(site: Site) -> None:
    with Burst(site.port) as burst:
        assert set(burst.ask(10)) == {3}
        set_traffic(site, Traffic(CANARY))
        answers = burst.ask(100_000)
        assert set(answers) == {1, 2}
        assert find_worst_window(answers, 2, 0.1) <= 10  # what is asked for: 10 % +- 1 %; it is 2
        model = ShareModel([(1, 9_000), (2, 1_000)])
        assert answers == [model.choose()[0] for _ in answers]
        set_traffic(site, None)
        assert set(burst.ask(10)) == {3}


def test_the_sample_takes_part_and_is_part(site: Site) -> None:
    """What is in it takes the way over Python, and is answered by the version that was chosen before."""
    seen = Seen()
    site.application.dataplane.samples.set_sampling("identity", seen)
    set_traffic(site, Traffic(CANARY, sampled=500))
    with Burst(site.port) as burst:
        answers = burst.ask(20_000)
    model = ShareModel([(1, 9_000), (2, 1_000)], sampled=500)
    choices = [model.choose() for _ in answers]
    assert answers == [version for version, _ in choices]
    assert find_worst_window(answers, 2, 0.1) <= 10
    in_sample = [version for version, is_sampled in choices if is_sampled]
    assert abs(len(in_sample) - 1_000) <= 3
    assert abs(in_sample.count(2) - 100) <= 5
    # each of them came to the observer, but for those that it was too slow for
    counts = site.application.dataplane.samples.counts()["identity"]
    site.application.dataplane.samples.set_sampling("identity")
    assert counts.taken + counts.dropped == len(in_sample)
    assert len(seen.versions) == counts.taken


class Seen:
    def __init__(self) -> None:
        self.versions: list[int] = []

    async def observe(self, sample: Sample, replay: Replay) -> None:
        self.versions.append(sample.servable.version)


@pytest.mark.parametrize("sampled", [0, 500])
def test_several_connections_share_the_shares(site: Site, sampled: int) -> None:
    set_traffic(site, Traffic(CANARY, sampled=sampled))
    bursts = [Burst(site.port) for _ in range(5)]
    try:
        before = count_answered(site)
        for _ in range(10):
            for burst in bursts:
                burst.send([""] * 200)
            for burst in bursts:
                burst.read()
            after = count_answered(site)
            grown = after - before
            assert sum(grown.values()) == 1_000
            assert abs(grown[2] - 100) <= 10
            before = after
    finally:
        for burst in bursts:
            burst.__exit__()


def test_a_large_request_is_placed_with_the_version_that_answers(site: Site) -> None:
    """Its version is chosen when its head has come, and holds when it is complete."""
    row = struct.pack("<f", 1.0) * WIDE
    body = prefixed(encode_request("identity", "", "", [("INPUT0", "FP32", (1, WIDE), row)]))
    set_traffic(site, Traffic(HALF, sampled=2_000))
    with Burst(site.port, body) as burst:
        answers = [burst.ask(1)[0] for _ in range(100)]
    model = ShareModel([(1, 5_000), (2, 5_000)], sampled=2_000)
    assert answers == [model.choose()[0] for _ in answers]


def test_a_refused_request_counts_once(site: Site) -> None:
    """The compiled desk has chosen when it sees what is wrong; Python says so, and chooses no second time."""
    set_traffic(site, Traffic(HALF))
    wrong = prefixed(encode_request("identity", "", "", [("INPUT0", "INT32", (1, 1), bytes(4))]))
    with Burst(site.port, wrong, explains=True) as bad, Burst(site.port) as good:
        refused = bad.ask(101)
        assert all("data-type is" in str(each) for each in refused), refused[0]
        model = ShareModel([(1, 5_000), (2, 5_000)])
        model.turns = 101
        assert good.ask(50) == [model.choose()[0] for _ in range(50)]


def test_a_key_keeps_its_version(site: Site) -> None:
    def ask(shares: tuple[Share, ...], times: int = 1, sampled: int = 0) -> dict[str, Any]:
        set_traffic(site, Traffic(shares, is_sticky=True, sampled=sampled))
        with Burst(site.port) as burst:
            answers = burst.ask(2_000 * times, lambda index: f"user-{index % 2_000}")
        for again in range(1, times):
            assert answers[:2_000] == answers[2_000 * again : 2_000 * (again + 1)]
        return {f"user-{number}": answer for number, answer in enumerate(answers[:2_000])}

    small, large = ask(CANARY, 2, sampled=300), ask(HALF)
    assert abs(Counter(small.values())[2] - 200) < 55  # four deviations
    assert abs(Counter(large.values())[2] - 1_000) < 90
    assert all(large[key] == 2 for key, version in small.items() if version == 2)
    model = ShareModel([(1, 9_000), (2, 1_000)], is_sticky=True)
    assert small == {key: model.choose(key.encode())[0] for key in small}
    with Burst(site.port) as burst:  # without a key it goes by the numbers
        assert find_worst_window(burst.ask(2_000), 2, 0.5) <= 10


def test_changes_under_load_fail_nobody(site: Site) -> None:
    answers: list[int | str] = []
    is_over = threading.Event()

    def ask() -> None:
        with Burst(site.port) as burst:
            while not is_over.is_set():
                answers.extend(burst.ask(500, lambda index: "" if index % 2 else f"user-{index}"))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()

    async def change() -> None:
        for turn in range(150):
            canary = turn % 100 * 100
            shares = (Share(1, 10_000 - canary), Share(2 + turn % 2, canary))
            traffic = Traffic(shares, is_sticky=turn % 3 == 0, sampled=turn % 4 * 100)
            site.application.manager.set_traffic("identity", traffic if turn % 10 else None)
            await asyncio.sleep(0.01)

    site.run(change())
    is_over.set()
    for thread in threads:
        thread.join()
    assert len(answers) > 1_000
    assert Counter(map(type, answers)) == {int: len(answers)}
    assert set(answers) == {1, 2, 3}


def test_a_version_that_is_not_there_gives_its_share_to_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(
        write_versions(tmp_path / "models", versions=2),
        io_threads=1,
        lifecycle={"control_mode": "explicit", "load_models": ["identity"]},
    )
    try:
        shares = (Share(1, 5_000), Share(2, 2_500), Share(7, 2_500))
        set_traffic(site, Traffic(shares))
        with Burst(site.port) as burst:
            answers = burst.ask(3_000)
            assert find_worst_window(answers, 2, 1 / 3) <= 10
            assert set(answers) == {1, 2}
            assert "version 7 is not ready and gets no requests, its share goes to version 1, 2" in caplog.text
            (tmp_path / "models" / "identity" / "7").mkdir()
            site.run(site.application.manager.load("identity"))
            answers = burst.ask(3_000)
            assert find_worst_window(answers, 7, 0.25) <= 10 and find_worst_window(answers, 1, 0.5) <= 10
            set_traffic(site, Traffic((Share(9, 10_000), Share(1, 0))))
        with Burst(site.port, explains=True) as burst:
            assert "'identity' version 9 is not at ready state" in str(burst.ask(1)[0])
        with Burst(site.port, prefixed(encode_values([1.0], version="1"))) as named:
            assert named.ask(2) == [1, 1]
    finally:
        site.close()
