"""What is taken away with time, and what is not."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from admin_site import Site, make_header, pack, refused
from aiorch_proto.admin.v1 import registry_pb2 as pb
from databases import on_every_database
from patience import PATIENCE
from sqlalchemy import select, update

from aiorch_server.deployments.housekeeping import Housekeeping
from aiorch_server.errors import RegistryUnavailable
from aiorch_server.registry.schema import idempotency, uploads
from aiorch_server.registry.session import Session
from aiorch_server.registry.versions import read_referenced

ARCHIVE = pack({"a": b"a" * 5000})
PART = pb.UploadVersionRequest


def list_files(site: Site, part: str) -> list[Path]:
    return [path for path in (site.folder / "artefacts" / part).rglob("*") if path.is_file()]


def age(paths: list[Path]) -> None:
    long_ago = time.time() - 3 * 24 * 3600
    for path in paths:
        os.utime(path, (long_ago, long_ago))


async def run(site: Site, statement: Any) -> list[Any]:
    def work(session: Session) -> list[Any]:
        found = session.execute(statement)
        return list(found) if found.returns_rows else []  # type: ignore[attr-defined]

    return await site.database.run(work)


@on_every_database
async def test_what_is_not_needed_any_more(site: Site) -> None:
    housekeeping = Housekeeping(site.database, site.store, site.uploads)
    for name in ("kept", "gone"):
        await site.upload(name, {"both": b"both", name: name.encode()}, create_model=True, idempotency_key=name)
    await site.registry.DeleteVersion(pb.DeleteVersionRequest(model="gone", version=1))
    header = make_header("kept", ARCHIVE)
    await refused(site.registry.UploadVersion(iter([PART(header=header), PART(chunk=ARCHIVE[:1000])])))
    await housekeeping.tidy()
    assert (len(list_files(site, "blobs")), len(list_files(site, "uploads"))) == (3, 1)  # all of it is too young

    age(list_files(site, "blobs") + list_files(site, "uploads"))
    for table in (uploads, idempotency):
        await run(site, update(table).values(expires_at=datetime.now(UTC) - timedelta(days=1)))
    await housekeeping.tidy()
    assert len(list_files(site, "blobs")) == 2
    assert not list_files(site, "uploads")
    for table in (uploads, idempotency):
        assert not await run(site, select(table))
    version = await site.registry.GetVersion(pb.GetVersionRequest(model="kept"))
    for file in version.files:
        with site.store.open(file.sha256) as blob:
            assert len(blob.read()) == file.size_bytes


async def test_files_are_asked_for_in_parts(site: Site) -> None:
    await site.upload("m", {f"f{number}": str(number).encode() for number in range(25)}, create_model=True)
    found: list[str] = []

    def work(session: Session) -> tuple[str, ...]:
        return read_referenced(session, after=found[-1] if found else "", limit=10)

    while page := await site.database.read(work):
        found += page
    assert found == sorted(set(found))
    assert len(found) == 25


async def test_nothing_is_deleted_while_nobody_can_say(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await site.upload("m", create_model=True)
    age(list_files(site, "blobs"))

    def fail(work: object) -> None:
        raise RegistryUnavailable("the database is away")

    monkeypatch.setattr(site.database, "read_blocking", fail)
    await Housekeeping(site.database, site.store, site.uploads).tidy()
    assert len(list_files(site, "blobs")) == 1


STUCK = """
import asyncio, sys, threading
from aiorch_server.deployments.housekeeping import Housekeeping

class Stuck:
    def __getattr__(self, name):
        def hang(*arguments):
            print("hangs", flush=True)
            threading.Event().wait()
        return hang

async def main():
    keeping = Housekeeping(Stuck(), Stuck(), Stuck(), interval_s=0.0)
    keeping.start()
    await asyncio.to_thread(sys.stdin.readline)
    await keeping.stop()
    print("stopped", flush=True)

asyncio.run(main())
"""


def test_a_store_that_hangs_does_not_hold_up_the_end() -> None:
    """Nor that of the process."""
    process = subprocess.Popen([sys.executable, "-c", STUCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "hangs\n"
        out, _ = process.communicate("\n", timeout=10 * PATIENCE)
        assert (out, process.returncode) == ("stopped\n", 0)
    finally:
        process.kill()
        process.communicate()


async def test_nothing_more_is_done_after_the_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was under way on its thread finds out before it deletes."""
    await site.upload("m", create_model=True)
    age(list_files(site, "blobs"))
    gate, begun, ended = threading.Event(), threading.Event(), threading.Event()
    blobs, collect = site.store.blobs, Housekeeping._collect

    def list_slowly() -> Any:
        begun.set()
        gate.wait(20)
        return blobs()

    def collect_and_tell(keeping: Housekeeping) -> None:
        try:
            collect(keeping)
        finally:
            ended.set()

    monkeypatch.setattr(site.store, "blobs", list_slowly)
    monkeypatch.setattr(Housekeeping, "_collect", collect_and_tell)
    monkeypatch.setattr(site.database, "read_blocking", lambda work: ())  # as if nothing were referenced
    keeping = Housekeeping(site.database, site.store, site.uploads, interval_s=0.0)
    keeping.start()
    assert await asyncio.to_thread(begun.wait, 20)
    await asyncio.wait_for(keeping.stop(), 5)
    gate.set()
    assert await asyncio.to_thread(ended.wait, 20)
    assert list_files(site, "blobs")
