"""``aiorch record`` against a server with a registry: the trace is what was sent, and a recording always ends."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from aiorch_client import Client, ClientError, NotFoundError
from aiorch_client.admin import AdminClient, AsyncAdminClient
from patience import PATIENCE
from running_site import Site, write_models

from aiorch_server.optimizer.arrivals import Trace

LIMIT_S = 20.0 * PATIENCE
#: Of no float that a time or a number of rows looks like.
SECRET = 1234.5678
SIZES = [1, 3, 8, 2, 1]
ENSEMBLE = """
    platform: "ensemble" max_batch_size: 8
    input { name: "INPUT0" data_type: TYPE_FP32 dims: [-1] }
    output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [-1] }
    ensemble_scheduling { step {
        model_name: "identity" model_version: -1
        input_map { key: "INPUT0" value: "INPUT0" } output_map { key: "OUTPUT0" value: "OUTPUT0" }
    } }
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("record")
    models = write_models(folder / "models")
    (models / "both" / "1").mkdir(parents=True)
    (models / "both" / "config.pbtxt").write_text(ENSEMBLE)
    registry = {
        "url": f"sqlite:///{folder}/aiorch.db",
        "artefacts": str(folder / "artefacts"),
        "cache_folder": str(folder / "cache"),
        "min_free_bytes": 0,
    }
    running = Site(models, io_threads=1, registry=registry)
    yield running
    running.close()


@pytest.fixture
def admin(site: Site) -> Iterator[AdminClient]:
    with AdminClient(site.target) as client:
        yield client


def send(site: Site, sizes: list[int]) -> None:
    with Client(site.target) as client:
        for rows in sizes:
            values = np.full((rows, 4), SECRET, np.float32)
            assert client.infer("identity", {"INPUT0": values})["OUTPUT0"].shape == (rows, 4)


def has_begun(site: Site) -> bool:
    """Whether a second one is refused; takes nothing of the first one's."""
    (queue,) = (each.plain_scheduler for each in site.application.manager.servables() if each.name == "identity")
    assert queue is not None
    try:
        queue.start_recording(1)
    except ValueError:
        return True
    queue.stop_recording()
    return False


def wait(look: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT_S
    while not look():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.01)


def begin(site: Site, target: Path, seconds: float) -> subprocess.Popen[str]:
    words = ["record", "identity", "--seconds", str(seconds), "--output", str(target), "--url", site.target, "--json"]
    return subprocess.Popen([sys.executable, "-m", "aiorch_server.cli", *words], stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]]]:
    text, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, [json.loads(line) for line in text.splitlines()]


def run(site: Site, *words: object) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "aiorch_server.cli", "record", *map(str, words), "--url", site.target, "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    return ran.returncode, json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["npz", "csv"])
def test_the_trace_is_what_was_sent(site: Site, tmp_path: Path, kind: str) -> None:
    target = tmp_path / f"trace.{kind}"
    process = begin(site, target, 2.0)
    wait(lambda: has_begun(site))
    send(site, SIZES)
    code, (document,) = finish(process)
    assert code == 0, document
    told = {"model": "identity", "version": 1, "requests": 5, "rows": 15, "lost": 0, "file": str(target)}
    assert document == {"recording": told}
    trace = Trace.load(target)
    assert trace.rows.tolist() == SIZES
    assert 0 < trace.duration_s < 2.0
    assert not has_begun(site), "it ended by itself"
    content = target.read_bytes()
    if kind == "npz":
        with np.load(target) as stored:
            assert sorted(stored) == ["rows", "times_ns"]
            content = b"".join(stored[name].tobytes() for name in stored)
    assert np.float32(SECRET).tobytes() not in content and str(SECRET).encode() not in content


def test_what_was_sent_before_and_after_is_not_in_it(site: Site, admin: AdminClient) -> None:
    send(site, [5])
    parts = admin.record_traffic("identity", 1.0)
    assert (first := next(parts)).version == 1 and not first.times_ns
    send(site, SIZES)
    rest = list(parts)
    send(site, [7])
    assert [rows for part in rest for rows in part.rows] == SIZES
    times_ns = [time for part in rest for time in part.times_ns]
    assert times_ns == sorted(times_ns) and times_ns[0] >= 0 and times_ns[-1] < 1.5e9
    assert sum(part.lost for part in rest) == 0


def test_a_second_one_is_refused_and_a_cancelled_one_makes_room(site: Site, admin: AdminClient, tmp_path: Path) -> None:
    first = admin.record_traffic("identity", 3600)
    next(first)
    with pytest.raises(ClientError, match="is being recorded already: one recording at a time") as raised:
        next(admin.record_traffic("identity", 1))
    assert raised.value.code is grpc.StatusCode.FAILED_PRECONDITION
    code, document = run(site, "identity", "--seconds", 1, "--output", tmp_path / "a.npz")
    assert (code, document["error"]["code"]) == (1, "FAILED_PRECONDITION")
    assert not (tmp_path / "a.npz").exists()
    other = admin.record_traffic("gate", 3600)
    next(other)
    first.close()  # type: ignore[attr-defined]
    wait(lambda: not has_begun(site))
    assert len(list(admin.record_traffic("identity", 0.1))) == 2
    other.close()  # type: ignore[attr-defined]


def test_ctrl_c_keeps_what_came(site: Site, tmp_path: Path) -> None:
    target = tmp_path / "trace.npz"
    process = begin(site, target, 3600)
    wait(lambda: has_begun(site))
    send(site, SIZES)
    time.sleep(1.2)  # two looks of the server
    process.send_signal(signal.SIGINT)
    code, (recording, error) = finish(process)
    assert (code, error["error"]["code"]) == (130, "INTERRUPTED")
    assert recording["recording"]["requests"] == len(SIZES) == len(Trace.load(target))
    wait(lambda: not has_begun(site))


async def test_awaited(site: Site) -> None:
    async with AsyncAdminClient(site.target) as admin:
        parts = admin.record_traffic("identity", 1.0)
        await anext(parts)
        await asyncio.to_thread(send, site, SIZES)
        assert [rows async for part in parts for rows in part.rows] == SIZES
        with pytest.raises(NotFoundError):
            await anext(admin.record_traffic("nobody", 1.0))
        task = asyncio.create_task(_exhaust(admin.record_traffic("identity", 3600)))
        await asyncio.to_thread(wait, lambda: has_begun(site))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait, lambda: not has_begun(site))


async def _exhaust(parts: Any) -> None:
    async for _ in parts:
        pass


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("nobody",), "NOT_FOUND", "nobody"),
        (("identity", "--version", 9), "NOT_FOUND", "9"),
        (("both",), "FAILED_PRECONDITION", "has no one queue of its own"),
        (("identity:1",), "USAGE", "the model's name alone"),
    ],
)
def test_what_cannot_be_recorded(site: Site, tmp_path: Path, words: tuple[object, ...], code: str, text: str) -> None:
    exit_code, document = run(site, *words, "--seconds", 1, "--output", tmp_path / "trace.npz")
    assert (document["error"]["code"], exit_code) == (code, 2 if code == "USAGE" else 1)
    assert text in document["error"]["text"]


def test_where_nothing_can_be_written(site: Site, tmp_path: Path) -> None:
    for target, text in ((tmp_path / "no" / "a.npz", "No such file"), (tmp_path / "a.txt", "an .npz or a .csv")):
        code, document = run(site, "identity", "--output", target)
        assert code == 2 and text in document["error"]["text"]


@pytest.mark.parametrize("seconds", [0.0, -1.0, 3601.0, 1e6])
def test_bounds(admin: AdminClient, seconds: float) -> None:
    with pytest.raises(ClientError, match=r"duration: is .* expected more than 0 and at most 3600") as raised:
        next(admin.record_traffic("identity", seconds, timeout_s=max(1.0, 1.0 - seconds)))
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_stop_ends_it(tmp_path: Path) -> None:
    registry = {
        "url": f"sqlite:///{tmp_path}/r.db",
        "artefacts": str(tmp_path / "a"),
        "cache_folder": str(tmp_path / "c"),
    }
    site = Site(write_models(tmp_path / "models"), io_threads=1, registry=registry)
    with AdminClient(site.target) as admin:
        parts = admin.record_traffic("identity", 3600)
        next(parts)
        begun_s = time.monotonic()
        stopped = site.begin_stop(LIMIT_S)
        with pytest.raises(ClientError, match="the server is stopping"):
            list(parts)
        stopped.result(LIMIT_S)
        assert time.monotonic() - begun_s < 5 * PATIENCE
    site.close()
