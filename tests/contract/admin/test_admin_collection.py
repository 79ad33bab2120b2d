"""Files that nobody needs any more are deleted while the same files are uploaded anew: the new version has them."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from admin_site import TIMEOUT_S, Site, make_header, pack, refused, stream
from aiorch_proto.admin.v1 import registry_pb2 as pb
from databases import migrated_database
from moto_server import MotoServer

from aiorch_server.deployments.housekeeping import Housekeeping
from aiorch_server.errors import StoreUnavailable
from aiorch_server.frontends.admin import upload_service
from aiorch_server.frontends.admin.upload_service import UploadService
from aiorch_server.registry.collect import LEASE, LEASE_S, exclude_uploads, read_collections
from aiorch_server.registry.leases import acquire_lease
from aiorch_server.registry.store import ArtefactStore, open_store

CONTENT = b"class Model: ...\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ARCHIVE = pack({"model.py": CONTENT})


@pytest.fixture(scope="module")
def moto() -> Iterator[MotoServer]:
    server = MotoServer()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
async def site(request: pytest.FixtureRequest, moto: MotoServer, tmp_path: Path) -> AsyncIterator[Site]:
    """A server with its artefacts in S3, where the files of the archive lie already, and nobody needs them."""
    url = f"s3://models/{uuid.uuid4().hex}"
    database = "" if request.param == "sqlite" else migrated_database("postgresql", tmp_path)
    running = Site(tmp_path, "native-1", url=database)
    running.open_store = lambda: open_store(url, scratch=tmp_path / uuid.uuid4().hex, options=moto.options)
    await running.start()
    await asyncio.to_thread(put, running.store)
    yield running
    await running.stop()


def put(store: ArtefactStore) -> None:
    with store.workspace() as folder:
        (folder / "0").write_bytes(CONTENT)
        store.put(SHA256, folder / "0")


def read(store: ArtefactStore) -> bytes:
    with store.open(SHA256) as file:
        return file.read()


def collect(site: Site, store: ArtefactStore) -> None:
    """As a server does it every ten minutes, but that all that there is counts as old."""
    Housekeeping(site.database, store, site.uploads, grace=timedelta(days=-1))._collect()


async def push(site: Site, **fields: Any) -> pb.Version:
    header = make_header("digits", ARCHIVE, create_model=True, **fields)
    answer: pb.Version = await site.registry.UploadVersion(stream(ARCHIVE, header), timeout=TIMEOUT_S)
    return answer


async def test_an_upload_between_a_look_at_a_file_and_its_deletion(site: Site) -> None:
    store: Any = site.open_store()
    looked, go_on, remove = threading.Event(), threading.Event(), store._files.rm_file

    def remove_later(path: str) -> None:
        looked.set()
        assert go_on.wait(TIMEOUT_S)
        remove(path)

    store._files.rm_file = remove_later
    collecting = asyncio.create_task(asyncio.to_thread(collect, site, store))
    assert await asyncio.to_thread(looked.wait, TIMEOUT_S)
    pushing = asyncio.create_task(push(site))
    await asyncio.wait((pushing,), timeout=0.5)
    go_on.set()
    await collecting
    assert (await pushing).version == 1
    assert await asyncio.to_thread(read, site.store) == CONTENT
    store.close()


async def test_files_that_were_deleted_before_their_version_was_recorded(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, finished = UploadService._finish_on_thread, []

    def finish_and_collect(service: UploadService, *arguments: Any) -> Any:
        finished.append(finish(service, *arguments))
        if len(finished) == 1:
            collect(site, site.store)
            assert site.store.find(SHA256) is None
        return finished[-1]

    monkeypatch.setattr(UploadService, "_finish_on_thread", finish_and_collect)
    assert (await push(site)).version == 1
    assert len(finished) == 2
    await asyncio.to_thread(collect, site, site.store)  # it is referenced now
    assert await asyncio.to_thread(read, site.store) == CONTENT


async def test_a_server_that_died_while_it_deleted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have deleted until its lease runs out: uploads wait for that, or are told to go on later."""
    monkeypatch.setattr(upload_service, "QUIET_PATIENCE_S", 0.1)
    await site.database.run(lambda session: acquire_lease(session, LEASE, "dead", duration_s=LEASE_S))
    error, details = await refused(push(site, upload_id="u1"))
    assert (error.code().name, details["ErrorInfo"].reason) == ("UNAVAILABLE", "REGISTRY_UNAVAILABLE")
    assert "being deleted" in str(error.details())
    page = await site.registry.ListModels(pb.ListModelsRequest())
    assert not page.models
    monkeypatch.setattr(upload_service, "QUIET_PATIENCE_S", TIMEOUT_S)
    await site.database.run(lambda session: acquire_lease(session, LEASE, "dead", duration_s=0.5))
    assert (await push(site, upload_id="u1")).version == 1


async def test_only_one_deletes_and_only_for_a_while(site: Site) -> None:
    def nest() -> None:
        with exclude_uploads(site.database) as first, exclude_uploads(site.database) as second:
            assert first() and not second()
        with exclude_uploads(site.database, hold_s=0.0) as late:
            assert not late()

    await asyncio.to_thread(nest)
    assert await site.database.read(read_collections) == 2


async def test_a_deletion_without_an_answer_may_still_come(site: Site) -> None:
    def fail(error: Exception) -> None:
        with exclude_uploads(site.database) as may_go_on:
            assert may_go_on()
            raise error

    with pytest.raises(ValueError, match="ours"):
        await asyncio.to_thread(fail, ValueError("ours"))
    assert await site.database.read(read_collections) == 1
    with pytest.raises(StoreUnavailable):
        await asyncio.to_thread(fail, StoreUnavailable("the store did not answer"))
    assert await site.database.read(read_collections) is None
