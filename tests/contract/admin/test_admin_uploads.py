"""UploadVersion and GetUpload: archives that arrive whole, break off, go on, and those that lie."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
import tracemalloc
import zipfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from admin_site import TIMEOUT_S, Site, make_header, pack, refused, speaking_as, status_of, stream
from aiorch_proto.admin.v1 import registry_pb2 as pb
from aiorch_proto.admin.v1.service import AdminStub
from databases import on_every_database

from aiorch_server.errors import RequestError
from aiorch_server.frontends.admin.upload_service import UploadService
from aiorch_server.registry.uploads import UploadBounds
from aiorch_server.security.roles import Role

FILES = {"model.py": b"class Model: ...\n", "data/weights.bin": bytes(range(256)) * 2000}
ARCHIVE = pack(FILES)
PART = pb.UploadVersionRequest


async def received(site: Site, header: pb.UploadHeader) -> int:
    request = pb.GetUploadRequest(model=header.model, upload_id=header.upload_id)
    return (await site.registry.GetUpload(request)).received_bytes


async def wait_received(site: Site, header: pb.UploadHeader, count: int) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                if await received(site, header) >= count:
                    return
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.NOT_FOUND
            await asyncio.sleep(0.01)


async def list_versions(site: Site, model: str = "digits") -> list[int]:
    try:
        page = await site.registry.ListVersions(pb.ListVersionsRequest(model=model))
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND
        return []
    return [each.version for each in page.versions]


async def test_a_version_with_all_that_is_known_of_it(site: Site) -> None:
    provenance = {
        "framework": "python",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "metrics": {"accuracy": 0.98},
        "git_commit": "abc",
        "labels": {"team": "vision"},
    }
    header = make_header("digits", ARCHIVE, provenance=provenance, create_model=True, aliases=["prod", "best"])
    version = await site.registry.UploadVersion(stream(ARCHIVE, header))
    assert (version.model, version.version, version.created_by) == ("digits", 1, "anybody")
    assert {file.path: (file.size_bytes, file.sha256) for file in version.files} == {
        path: (len(content), hashlib.sha256(content).hexdigest()) for path, content in FILES.items()
    }
    assert version.has_code
    assert version.provenance == pb.Provenance(**provenance)
    assert sorted(version.aliases) == ["best", "prod"]
    assert await site.registry.GetVersion(pb.GetVersionRequest(model="digits", version=1)) == version
    upload = await site.registry.GetUpload(pb.GetUploadRequest(model="digits", upload_id=header.upload_id))
    assert (upload.version, upload.received_bytes, upload.size_bytes) == (1, len(ARCHIVE), len(ARCHIVE))
    for file in version.files:
        with site.store.open(file.sha256) as blob:
            assert blob.read() == FILES[file.path]
    (entry,) = await site.audit()
    assert (entry.model, entry.outcome) == ("digits", "OK")
    assert header.sha256 in entry.detail
    assert not list((site.folder / "artefacts" / "uploads").iterdir())


async def test_a_zip(site: Site) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("model.onnx", b"onnx")
    content = packed.getvalue()
    header = make_header("digits", content, create_model=True, format=pb.ARCHIVE_FORMAT_ZIP)
    assert [each.path for each in (await site.registry.UploadVersion(stream(content, header))).files] == ["model.onnx"]


async def test_synchronous_stubs(site: Site) -> None:
    def work() -> int:
        with grpc.insecure_channel(site.target) as channel:
            registry = AdminStub(channel).ModelRegistry
            header = make_header("digits", ARCHIVE, create_model=True)
            return int(registry.UploadVersion(stream(ARCHIVE, header), timeout=TIMEOUT_S).version)

    assert await asyncio.to_thread(work) == 1


@pytest.mark.parametrize("how", ["cancel", "deadline", "half-close"])
async def test_what_breaks_off_goes_on(site: Site, how: str) -> None:
    header = make_header("digits", ARCHIVE, create_model=True)
    sent, first = threading.Event(), 300_000

    async def begin() -> AsyncIterator[Any]:
        yield PART(header=header)
        yield PART(chunk=ARCHIVE[: first // 2])
        yield PART(chunk=ARCHIVE[first // 2 : first])
        if how != "half-close":
            await wait_received(site, header, first)
            sent.set()
            await asyncio.sleep(TIMEOUT_S)

    call = site.registry.UploadVersion(begin(), timeout=1.0 if how == "deadline" else TIMEOUT_S)
    if how == "cancel":
        await asyncio.to_thread(sent.wait, TIMEOUT_S)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    else:
        error, *_ = await asyncio.gather(call, return_exceptions=True)
        assert isinstance(error, grpc.aio.AioRpcError)
        assert error.code().name == {"deadline": "DEADLINE_EXCEEDED", "half-close": "FAILED_PRECONDITION"}[how]
    assert await received(site, header) == first
    assert await list_versions(site) == []
    header.offset = first
    version = await site.registry.UploadVersion(stream(ARCHIVE, header))
    assert (version.version, len(version.files)) == (1, 2)


async def test_it_goes_on_after_a_restart(site: Site) -> None:
    header = make_header("digits", ARCHIVE, create_model=True)
    await refused(site.registry.UploadVersion(iter([PART(header=header), PART(chunk=ARCHIVE[:1000])])))
    await site.stop()
    await site.start()
    header.offset = 1000
    assert (await site.registry.UploadVersion(stream(ARCHIVE, header))).version == 1


async def test_a_piece_may_come_again(site: Site) -> None:
    """A client that does not know how much came may begin anew, or before the end of what came."""
    header = make_header("digits", ARCHIVE, create_model=True)
    await refused(site.registry.UploadVersion(iter([PART(header=header), PART(chunk=ARCHIVE[:1000])])))
    header.offset = 500
    assert (await site.registry.UploadVersion(stream(ARCHIVE, header))).version == 1


BAD_HEADERS: list[tuple[dict[str, Any], str, str]] = [
    ({"sha256": "x"}, "INVALID_ARGUMENT", "SHA-256"),
    ({"sha256": "A" * 64}, "INVALID_ARGUMENT", "SHA-256"),
    ({"sha256": ""}, "INVALID_ARGUMENT", "SHA-256"),
    ({"size_bytes": 0}, "INVALID_ARGUMENT", "size"),
    ({"size_bytes": -5}, "INVALID_ARGUMENT", "size"),
    ({"size_bytes": 2**62}, "RESOURCE_EXHAUSTED", "bytes"),
    ({"offset": -1}, "INVALID_ARGUMENT", "header.offset: is -1; expected 0 to size_bytes"),
    ({"offset": 2**62}, "INVALID_ARGUMENT", "header.offset"),
    ({"offset": 7}, "FAILED_PRECONDITION", ""),
    ({"format": 0}, "INVALID_ARGUMENT", "header.format: is 0; expected one of ARCHIVE_FORMAT_TAR,"),
    ({"format": 99}, "INVALID_ARGUMENT", "header.format: is 99"),
    ({"aliases": ["Prod"]}, "INVALID_ARGUMENT", "'Prod'"),
    ({"upload_id": "x" * 10_000}, "INVALID_ARGUMENT", "upload_id"),
    ({"upload_id": "a\nb"}, "INVALID_ARGUMENT", "upload_id"),
    ({"upload_id": "../../x"}, "OK", ""),
    ({"provenance": {"metrics": {"m": float("nan")}}}, "INVALID_ARGUMENT", "finite"),
    ({"provenance": {"labels": {"": "x"}}}, "INVALID_ARGUMENT", "label"),
    ({"create_model": False}, "NOT_FOUND", "model 'digits' is not registered"),
    ({"format": pb.ARCHIVE_FORMAT_ZIP}, "INVALID_ARGUMENT", ""),
]


@pytest.mark.parametrize(("fields", "code", "text"), BAD_HEADERS, ids=str)
async def test_headers_that_cannot_be(site: Site, fields: dict[str, Any], code: str, text: str) -> None:
    header = make_header("digits", ARCHIVE, **{"create_model": True, **fields})
    messages = [PART(header=header), PART(chunk=ARCHIVE[max(header.offset, 0) :])]
    if code == "OK":
        assert (await site.registry.UploadVersion(iter(messages))).version == 1
        return
    error, _ = await refused(site.registry.UploadVersion(iter(messages)))
    assert (error.code().name, text in str(error.details())) == (code, True), error.details()
    assert await list_versions(site) == []
    (entry,) = await site.audit()
    assert (entry.outcome, entry.model) == (code, "digits")


async def test_streams_that_make_no_sense(site: Site) -> None:
    header = make_header("digits", ARCHIVE, create_model=True)
    for messages, field in (
        ([], "header"),
        ([PART(chunk=b"x")], "header"),
        ([PART()], "header"),
        ([PART(header=header), PART(header=header)], "chunk"),
        ([PART(header=header), PART()], "chunk"),
        ([PART(header=header), PART(chunk=bytes((4 << 20) + 1))], "chunk"),
    ):
        error, details = await refused(site.registry.UploadVersion(iter(messages)))
        assert error.code().name == "INVALID_ARGUMENT"
        assert details["BadRequest"].field_violations[0].field == field


async def test_bytes_that_are_not_those_announced(site: Site) -> None:
    header = make_header("digits", ARCHIVE, create_model=True, sha256="0" * 64)
    assert await status_of(site.registry.UploadVersion(stream(ARCHIVE, header))) == ("DATA_LOSS", "CHECKSUM_MISMATCH")
    request = pb.GetUploadRequest(model="digits", upload_id=header.upload_id)
    assert (await status_of(site.registry.GetUpload(request)))[0] == "NOT_FOUND"
    header.sha256 = hashlib.sha256(ARCHIVE).hexdigest()
    assert (await site.registry.UploadVersion(stream(ARCHIVE, header))).version == 1


async def test_more_and_other_bytes(site: Site) -> None:
    header = make_header("digits", ARCHIVE, create_model=True)
    more = [PART(header=header), PART(chunk=ARCHIVE), PART(chunk=b"x")]
    assert (await status_of(site.registry.UploadVersion(iter(more))))[0] == "INVALID_ARGUMENT"
    other = [PART(header=header), PART(chunk=b"x" * 1000)]
    assert (await status_of(site.registry.UploadVersion(iter(other))))[0] == "ABORTED"
    assert await list_versions(site) == []
    header.offset = len(ARCHIVE)
    assert (await site.registry.UploadVersion(iter([PART(header=header)]))).version == 1


async def test_an_id_that_is_of_another_archive(site: Site) -> None:
    header = make_header("digits", ARCHIVE, create_model=True)
    await refused(site.registry.UploadVersion(iter([PART(header=header), PART(chunk=ARCHIVE[:1000])])))
    other = pack({"a": b"b"})
    clash = make_header("digits", other, create_model=True, upload_id=header.upload_id)
    assert (await status_of(site.registry.UploadVersion(stream(other, clash))))[0] == "ABORTED"
    with speaking_as("bob", (Role.ADMIN, "*")):
        assert (await status_of(site.registry.UploadVersion(stream(ARCHIVE, header))))[0] == "ABORTED"


async def test_an_archive_that_leaves_its_folder(site: Site) -> None:
    archive = pack({"../../etc/passwd": b"x"})
    header = make_header("digits", archive, create_model=True)
    assert (await status_of(site.registry.UploadVersion(stream(archive, header))))[0] == "INVALID_ARGUMENT"
    assert await list_versions(site) == []


@on_every_database
async def test_an_upload_is_done_once(site: Site) -> None:
    """With its key, and by its id alone."""
    call = site.channel.stream_unary("/aiorch.admin.v1.ModelRegistry/UploadVersion")

    def messages(**fields: Any) -> Iterator[bytes]:
        header = make_header("digits", ARCHIVE, **{"create_model": True, "upload_id": "u1", **fields})
        return (each.SerializeToString() for each in stream(ARCHIVE, header))

    first = await call(messages(idempotency_key="k1"))
    assert await call(messages(idempotency_key="k1")) == first
    assert await call(messages(idempotency_key="k1", offset=1000)) == first
    assert await call(messages()) == first
    assert await list_versions(site) == [1]
    _, details = await refused(call(messages(idempotency_key="k1", aliases=["prod"])))
    assert details["ErrorInfo"].reason == "IDEMPOTENCY_KEY_REUSED"


async def test_a_later_stream_takes_over(site: Site) -> None:
    """The first one's connection may be dead without anybody knowing."""
    header = make_header("digits", ARCHIVE, create_model=True)
    waiting = asyncio.Event()

    async def stall() -> AsyncIterator[Any]:
        yield PART(header=header)
        yield PART(chunk=ARCHIVE[:1000])
        await waiting.wait()

    stalled = asyncio.ensure_future(site.registry.UploadVersion(stall()))
    await wait_received(site, header, 1000)
    again = pb.UploadHeader()
    again.CopyFrom(header)
    again.offset = 1000
    assert (await site.registry.UploadVersion(stream(ARCHIVE, again))).version == 1
    error, _ = await refused(stalled)
    assert (error.code().name, error.details()) == ("ABORTED", "another stream of this upload has taken over")
    waiting.set()
    assert await list_versions(site) == [1]


async def test_many_streams_of_one_upload(site: Site) -> None:
    """However they get in each other's way: one version, and each is told it or why not."""
    header = make_header("digits", ARCHIVE, create_model=True)
    calls = [site.registry.UploadVersion(stream(ARCHIVE, header, 10_000)) for _ in range(8)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert any(isinstance(each, pb.ModelVersion) for each in results)
    for result in results:
        if isinstance(result, grpc.aio.AioRpcError):
            assert result.code().name == "ABORTED", result.details()
        else:
            assert result.version == 1
    assert await list_versions(site) == [1]
    assert [entry.outcome for entry in await site.audit()].count("OK") == 1


async def test_many_uploads_at_once(site: Site) -> None:
    versions = await asyncio.gather(*[site.upload("digits", create_model=True) for _ in range(6)])
    assert sorted(each.version for each in versions) == [1, 2, 3, 4, 5, 6]
    assert len({each.digest for each in versions}) == 1


@pytest.fixture
async def slow_site(door: str, tmp_path: Path) -> AsyncIterator[Site]:
    running = Site(tmp_path, door, UploadBounds(spare_bytes=0, open_per_principal=2))
    await running.start()
    yield running
    await running.stop()


async def test_how_many_may_be_open(slow_site: Site) -> None:
    for number in range(2):
        header = make_header("digits", ARCHIVE, create_model=True, upload_id=f"u{number}")
        await refused(slow_site.registry.UploadVersion(iter([PART(header=header), PART(chunk=b"x")])))
    header = make_header("digits", ARCHIVE, create_model=True)
    error, details = await refused(slow_site.registry.UploadVersion(stream(ARCHIVE, header)))
    assert (error.code().name, details["ErrorInfo"].reason) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
    assert details["QuotaFailure"].violations


async def test_no_more_is_read_than_is_written(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is faster than the disk is held back; the server holds a few pieces, never the archive."""
    size = 256 << 20
    gate, begun = threading.Event(), threading.Event()
    append = site.uploads.append

    def slow_append(*arguments: Any, **more: Any) -> int:
        begun.set()
        assert gate.wait(TIMEOUT_S)
        return append(*arguments, **more)

    monkeypatch.setattr(site.uploads, "append", slow_append)
    header = make_header("digits", b"", create_model=True, size_bytes=size, sha256="0" * 64)
    piece, sent = bytes(4 << 20), 0

    async def flood() -> AsyncIterator[Any]:
        nonlocal sent
        yield PART(header=header)
        while sent < size:
            yield PART(chunk=piece)
            sent += len(piece)

    call = asyncio.ensure_future(site.registry.UploadVersion(flood()))
    await asyncio.to_thread(begun.wait, TIMEOUT_S)
    before = -1
    while before != sent:
        before = sent
        await asyncio.sleep(0.3)
    assert sent <= 96 << 20
    call.cancel()
    gate.set()
    await asyncio.gather(call, return_exceptions=True)


async def test_the_memory_of_an_upload(site: Site) -> None:
    """64 MiB pass through; what Python holds at any moment is a few pieces."""
    content = pack({"weights.bin": bytes(64 << 20)})
    header = make_header("digits", content, create_model=True)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        version = await site.registry.UploadVersion(stream(content, header, 1 << 20))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert version.size_bytes == 64 << 20
    assert peak - before < 40 << 20


async def test_a_client_that_leaves_at_the_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has come whole becomes a version, and the client finds it."""
    gate, begun = threading.Event(), threading.Event()
    finish = site.uploads.finish

    def slow_finish(*arguments: Any, **more: Any) -> Any:
        begun.set()
        assert gate.wait(TIMEOUT_S)
        return finish(*arguments, **more)

    monkeypatch.setattr(site.uploads, "finish", slow_finish)
    header = make_header("digits", ARCHIVE, create_model=True)
    call = asyncio.ensure_future(site.registry.UploadVersion(stream(ARCHIVE, header)))
    await asyncio.to_thread(begun.wait, TIMEOUT_S)
    call.cancel()
    again = asyncio.ensure_future(site.registry.UploadVersion(stream(ARCHIVE, header)))
    await asyncio.gather(call, return_exceptions=True)
    assert await list_versions(site) == []
    gate.set()
    assert (await again).version == 1
    assert await list_versions(site) == [1]


async def test_what_becomes_of_an_upload_is_told_to_whose_it_is(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was no archive is dropped, and its id may be somebody else's before its own caller has heard of it."""
    make, gate, dropped = UploadService._make_version, asyncio.Event(), asyncio.Event()

    async def make_slowly(service: UploadService, *arguments: Any) -> bytes:
        try:
            return await make(service, *arguments)
        except RequestError:
            dropped.set()
            await gate.wait()
            raise

    monkeypatch.setattr(UploadService, "_make_version", make_slowly)
    wrong = pack({"../model.py": b""})
    with speaking_as("ann", (Role.ADMIN, "*")):
        header = make_header("digits", wrong, create_model=True, upload_id="u1")
        first = asyncio.ensure_future(site.registry.UploadVersion(stream(wrong, header)))
        await asyncio.wait_for(dropped.wait(), TIMEOUT_S)
    with speaking_as("bob", (Role.ADMIN, "*")):
        header = make_header("digits", ARCHIVE, create_model=True, upload_id="u1")
        second = asyncio.ensure_future(site.registry.UploadVersion(stream(ARCHIVE, header)))
        done, _ = await asyncio.wait((second,), timeout=TIMEOUT_S / 2)
        gate.set()
        assert done and (await second).created_by == "bob"
    error, _ = await refused(first)
    assert error.code().name == "INVALID_ARGUMENT"


async def test_a_patient_server(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends nothing more is told so, and may go on later."""
    from aiorch_server.frontends.admin import upload_service

    monkeypatch.setattr(upload_service, "PATIENCE_S", 0.3)
    site = Site(tmp_path, door)
    await site.start()
    site.services._uploads._patience_s = 0.3
    header = make_header("digits", ARCHIVE, create_model=True)

    async def stall() -> AsyncIterator[Any]:
        yield PART(header=header)
        yield PART(chunk=ARCHIVE[:1000])
        await asyncio.sleep(TIMEOUT_S)

    error, details = await refused(site.registry.UploadVersion(stall()))
    assert (error.code().name, details["ErrorInfo"].reason) == ("UNAVAILABLE", "STREAM_STALLED")
    assert "what came stays" in str(error.details())
    assert await received(site, header) == 1000
    await site.stop()
