"""A database that stands still, and a disk that is full, beside a server under load; each gives its figures."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiorch_client.errors import ClientError
from chaos_book import Content
from chaos_scene import MODEL, scene
from databases import PostgresServer
from patience import PATIENCE

from aiorch_server.registry.database import TIMEOUT_S

#: What a change may take until it is told that the database is away: its own limit, that of a call's wait for a thread,
#: and what a busy machine adds.
REFUSAL_LIMIT_S = (TIMEOUT_S + 1.0) + 3.0 * PATIENCE
RECOVERY_LIMIT_S = 20.0 * PATIENCE


def stop_database(folder: Path, seconds: float, *, seed: int) -> dict[str, Any]:
    """PostgreSQL stands still for so long: requests do not notice, changes fail soon and in words, then go on."""
    database = PostgresServer()
    try:
        with scene(folder, database.create(), folder / "artefacts", seed=seed) as found:
            rng = random.Random(seed)
            answered = found.load.tally.answered
            refusals: list[float] = []
            database.send(signal.SIGSTOP)
            began = time.monotonic()
            try:
                while time.monotonic() < began + seconds:
                    refusals.append(_refuse(found.admin, len(refusals)))
                    time.sleep(0.2)
            finally:
                database.send(signal.SIGCONT)
            meanwhile = found.load.tally.answered - answered
            recovered_s = _recover(found.admin)
            version = found.push(Content.make(rng, most_bytes=100_000))
            deployment = found.admin.deploy(MODEL, version)
            assert deployment.rollout is not None
            assert found.admin.wait(deployment.rollout, timeout_s=60, look_s=0.05).state.value == "succeeded"
            assert found.admin.get_model(MODEL).description == "after"
            assert found.admin.verify_audit().is_intact
            tally = found.check()
            assert meanwhile > seconds * 5, f"only {meanwhile} requests were answered in {seconds} s"
        return {
            "stopped_s": seconds,
            "requests_answered_meanwhile": meanwhile,
            "requests_failed": len(tally.failed),
            "changes_refused": len(refusals),
            "longest_refusal_s": round(max(refusals), 2),
            "recovered_s": round(recovered_s, 2),
        }
    finally:
        database.close()


def _refuse(admin: Any, number: int) -> float:
    """A change that must be refused for the database's sake; gives how long that took."""
    began = time.monotonic()
    with pytest.raises(ClientError) as raised:
        admin.update_model(MODEL, description=f"meanwhile {number}")
    took = time.monotonic() - began
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE, raised.value
    assert raised.value.reason in ("REGISTRY_UNAVAILABLE", "OUTCOME_UNKNOWN"), raised.value
    assert took < REFUSAL_LIMIT_S, f"a change was refused after {took:.1f} s only"
    return took


def _recover(admin: Any) -> float:
    began = time.monotonic()
    while True:
        try:
            admin.update_model(MODEL, description="after")
            return time.monotonic() - began
        except ClientError as error:
            assert error.code is grpc.StatusCode.UNAVAILABLE, error
            assert time.monotonic() < began + RECOVERY_LIMIT_S, error
            time.sleep(0.05)


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A disk of its own; skips the test where mounting is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", folder]
    mounted = subprocess.run(command, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill_disk(folder: Path, url: str, *, attempts: int, seed: int) -> dict[str, Any]:
    """The artefacts' disk gets full during uploads: they are refused in words, and go on when there is room."""
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    with small_disk(folder / "disk", 16 << 20) as disk, scene(folder, url, disk / "artefacts", seed=seed) as found:
        for attempt in range(attempts):
            free = found.folder / "disk"
            room = _room(free)
            ballast = free / "ballast"
            # an upload needs twice its size: as it comes, and unpacked
            content = Content.make(rng, most_bytes=64 << 10)
            own = rng.randbytes(rng.randrange(200 << 10, 700 << 10))
            content = Content(content.number, {**content.files, "own.bin": own})
            left = rng.randrange(0, 2 * len(own))
            ballast.write_bytes(bytes(max(0, room - left)))
            upload_id = f"upload-{seed}-{attempt}"
            try:
                found.push(content, upload_id=upload_id)
                counts["fitted"] += 1
            except ClientError as error:
                assert error.code is grpc.StatusCode.UNAVAILABLE, error
                assert "no room" in error.details or "full" in error.details, error
                counts["refused"] += 1
                visible = {each.version for each in found.admin.list_versions(MODEL)}
                assert visible == set(found.contents), "a version that was not acknowledged is visible"
                ballast.unlink()
                found.push(content, upload_id=upload_id)
                counts["went on"] += 1
            ballast.unlink(missing_ok=True)
            version = max(found.contents)
            deployment = found.admin.deploy(MODEL, version)
            assert deployment.rollout is not None
            ended = found.admin.wait(deployment.rollout, timeout_s=60, look_s=0.05)
            assert ended.state.value == "succeeded", ended.reason
        tally = found.check()
        assert not list((disk / "artefacts" / "uploads").iterdir())
    return {**counts, "requests_answered": tally.answered, "requests_failed": len(tally.failed)}


def _room(folder: Path) -> int:
    import os

    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
