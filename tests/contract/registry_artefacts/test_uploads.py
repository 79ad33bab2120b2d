"""Uploads that break off, repeat, lie, expire, race, and meet a full disk."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from archives import make_tar, make_zip, pack
from registry_uploads import NOW, announce

from aiorch_server.errors import (
    CapacityError,
    ChecksumMismatch,
    Conflict,
    PayloadTooLarge,
    PreconditionFailed,
    QuotaExceeded,
    RequestError,
)
from aiorch_server.registry.archives import ArchiveBounds, ArchiveFormat
from aiorch_server.registry.store import ArtefactStore, open_store
from aiorch_server.registry.uploads import UploadBounds, Uploads

CONTENT = make_tar({"model.onnx": b"graph" * 1000, "labels.txt": b"cat"})


def is_empty(store: ArtefactStore) -> bool:
    return not list(store.blobs()) and not store.upload_keys()


def test_in_pieces(store: ArtefactStore) -> None:
    uploads = Uploads(store)
    upload = announce(uploads, CONTENT)
    assert uploads.received_bytes(upload) == 0
    for offset in range(0, len(CONTENT), 2000):
        piece = CONTENT[offset : offset + 2000]
        assert uploads.append(upload, offset, memoryview(piece), now=NOW) == offset + len(piece)
    assert not list(store.blobs())
    finished = uploads.finish(upload, now=NOW)
    assert [file.path for file in finished.manifest.files] == ["labels.txt", "model.onnx"]
    assert not finished.has_code
    assert {blob.sha256 for blob in store.blobs()} == {file.sha256 for file in finished.manifest.files}
    assert uploads.finish(upload, now=NOW) == finished  # until the caller has recorded it
    uploads.drop(upload)
    uploads.drop(upload)
    assert not store.upload_keys()


def test_going_on_elsewhere(store: ArtefactStore) -> None:
    upload = announce(Uploads(store), CONTENT)
    Uploads(store).append(upload, 0, CONTENT[:3000], now=NOW)
    other = Uploads(store)
    assert other.received_bytes(upload) == 3000
    other.append(upload, 3000, CONTENT[3000:], now=NOW)
    assert other.finish(upload, now=NOW).manifest.size_bytes == 5003


def test_pieces_that_come_again(store: ArtefactStore) -> None:
    uploads = Uploads(store)
    upload = announce(uploads, CONTENT)
    for begin, end, received in (
        (0, 100, 100),
        (0, 100, 100),
        (50, 100, 100),
        (50, 300, 300),
        (0, 200, 300),
        (300, 300, 300),
    ):
        assert uploads.append(upload, begin, CONTENT[begin:end], now=NOW) == received
    with pytest.raises(PreconditionFailed, match=r"301 leaves a gap: 300 bytes"):
        uploads.append(upload, 301, b"x", now=NOW)
    with pytest.raises(Conflict, match="other bytes"):
        uploads.append(upload, 0, b"x" * 100, now=NOW)
    with pytest.raises(Conflict, match="other bytes"):
        uploads.append(upload, 250, b"x" * 100, now=NOW)
    assert uploads.received_bytes(upload) == 300
    for offset, chunk in ((-1, b"x"), (len(CONTENT), b"x"), (300, CONTENT)):
        with pytest.raises(RequestError, match="announced"):
            uploads.append(upload, offset, chunk, now=NOW)
    with pytest.raises(PreconditionFailed, match=f"300 of {len(CONTENT)} bytes"):
        uploads.finish(upload, now=NOW)
    uploads.append(upload, 300, CONTENT[300:], now=NOW)
    uploads.finish(upload, now=NOW)


@pytest.mark.parametrize(
    "content", [b"x" * 2000, make_tar({"../evil": b"x"}), make_tar({})], ids=["no tar", "slip", "empty"]
)
def test_what_can_never_become_a_version_is_dropped(store: ArtefactStore, content: bytes) -> None:
    uploads = Uploads(store)
    upload = announce(uploads, content)
    uploads.append(upload, 0, content, now=NOW)
    with pytest.raises(RequestError, match="archive"):
        uploads.finish(upload, now=NOW)
    assert is_empty(store)


def test_a_checksum_that_does_not_agree(store: ArtefactStore) -> None:
    uploads = Uploads(store)
    upload = announce(uploads, CONTENT, sha256="0" * 64)
    uploads.append(upload, 0, CONTENT, now=NOW)
    with pytest.raises(ChecksumMismatch, match=hashlib.sha256(CONTENT).hexdigest()):
        uploads.finish(upload, now=NOW)
    assert is_empty(store)
    assert uploads.received_bytes(upload) == 0


def test_an_archive_that_is_refused_in_the_middle_leaves_no_blob(store: ArtefactStore) -> None:
    content = make_tar({"model.onnx": b"graph", "zzz/../x": b"x"})
    uploads = Uploads(store)
    upload = announce(uploads, content)
    uploads.append(upload, 0, content, now=NOW)
    with pytest.raises(RequestError, match="leads out"):
        uploads.finish(upload, now=NOW)
    assert is_empty(store)


def test_announcements_that_are_wrong(folder_store: ArtefactStore) -> None:
    uploads = Uploads(folder_store, UploadBounds(archive_bytes=1000))
    with pytest.raises(RequestError, match="checksum"):
        announce(uploads, b"x", sha256="X" * 64)
    with pytest.raises(RequestError, match="above 0"):
        announce(uploads, b"")
    with pytest.raises(PayloadTooLarge, match="1001 bytes, at most 1000"):
        announce(uploads, b"x" * 1001)
    assert is_empty(folder_store)


def test_open_uploads_are_counted(folder_store: ArtefactStore) -> None:
    uploads = Uploads(folder_store, UploadBounds(open_per_principal=2))
    one, two = announce(uploads, b"x", upload_id="1"), announce(uploads, b"x", upload_id="2")

    def begin(upload_id: str) -> object:
        return uploads.begin(
            model="digits",
            upload_id=upload_id,
            principal="ann",
            format=ArchiveFormat.TAR,
            size_bytes=1,
            sha256="0" * 64,
            now=NOW,
            open_uploads=[one, two],
        )

    with pytest.raises(QuotaExceeded, match="ann has 2 uploads open"):
        begin("3")
    begin("2")
    two = replace(two, expires_at=NOW)
    begin("3")


def test_names_that_would_be_paths(store: ArtefactStore) -> None:
    uploads = Uploads(store)
    keys = set()
    for upload_id in ("../../evil", "a/b", "\0", "x" * 10_000, "'; drop table uploads; --", "\udcff"):
        upload = replace(announce(uploads, CONTENT), upload_id=upload_id)
        uploads.append(upload, 0, b"\0" * 10, now=NOW)
        keys.add(upload.key)
    assert set(store.upload_keys()) == keys
    assert len(keys) == 6
    assert replace(upload, model="a", upload_id="bc").key != replace(upload, model="ab", upload_id="c").key


def test_an_expired_upload(store: ArtefactStore) -> None:
    uploads = Uploads(store, UploadBounds(lifetime_s=3600))
    upload = announce(uploads, CONTENT)
    uploads.append(upload, 0, CONTENT, now=NOW)
    late = NOW + timedelta(hours=1)
    for call in (lambda: uploads.append(upload, 0, CONTENT, now=late), lambda: uploads.finish(upload, now=late)):
        with pytest.raises(PreconditionFailed, match="expired at 2026-01-01 01:00:00 UTC"):
            call()
    assert uploads.sweep(now=datetime.now(UTC)) == 0
    assert uploads.sweep(now=datetime.now(UTC) + timedelta(hours=2)) == 1
    assert is_empty(store)


def test_two_calls_for_one_upload(folder_store: ArtefactStore, tmp_path: Path) -> None:
    uploads = Uploads(folder_store)
    upload = announce(uploads, CONTENT)
    uploads.append(upload, 0, CONTENT, now=NOW)
    elsewhere = open_store(str(tmp_path / "store"))
    with folder_store.pieces(upload.key).open():
        for other in (uploads, Uploads(elsewhere)):
            with pytest.raises(Conflict, match="another call"):
                other.finish(upload, now=NOW)
            with pytest.raises(Conflict, match="another call"):
                other.append(upload, 0, CONTENT[:5], now=NOW)
    uploads.finish(upload, now=NOW)
    elsewhere.close()


def test_a_bomb(store: ArtefactStore) -> None:
    content = pack(make_tar({"model.onnx": bytes(8 << 20)}))
    bounds = UploadBounds(archive=ArchiveBounds(free_expansion_bytes=1 << 20))
    uploads = Uploads(store, bounds)
    upload = announce(uploads, content, format=ArchiveFormat.TAR_GZ)
    uploads.append(upload, 0, content, now=NOW)
    with pytest.raises(PayloadTooLarge, match="bomb"):
        uploads.finish(upload, now=NOW)
    assert is_empty(store)


# a full disk


def test_no_room_is_told_before_anything_comes(folder_store: ArtefactStore) -> None:
    uploads = Uploads(folder_store, UploadBounds(spare_bytes=1 << 60))
    with pytest.raises(CapacityError, match="no room for 1 bytes"):
        announce(uploads, b"x")
    assert is_empty(folder_store)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_a_disk_that_fills_up_while_pieces_come(folder_store: ArtefactStore) -> None:
    uploads = Uploads(folder_store)
    upload = announce(uploads, CONTENT)
    with largest_file(3000), pytest.raises(CapacityError, match="full"):
        for offset in range(0, len(CONTENT), 2000):
            uploads.append(upload, offset, CONTENT[offset : offset + 2000], now=NOW)
    received = uploads.received_bytes(upload)
    assert 2000 <= received <= 3000
    uploads.append(upload, received, CONTENT[received:], now=NOW)
    uploads.finish(upload, now=NOW)


@pytest.mark.parametrize("format", [ArchiveFormat.TAR, ArchiveFormat.ZIP])
def test_a_disk_that_fills_up_while_unpacking(
    folder_store: ArtefactStore, tmp_path: Path, format: ArchiveFormat
) -> None:
    files = {"a.bin": b"x" * 10_000, "model.onnx": b"graph"}
    content = make_tar(files) if format is ArchiveFormat.TAR else make_zip(files)
    uploads = Uploads(folder_store)
    upload = announce(uploads, content, format=format)
    uploads.append(upload, 0, content, now=NOW)
    with largest_file(5000), pytest.raises(CapacityError, match="full"):
        uploads.finish(upload, now=NOW)
    assert not list(folder_store.blobs())
    assert [list(each.iterdir()) for each in (tmp_path / "store" / "staging").iterdir()] == [[]]
    uploads.finish(upload, now=NOW)  # what came is still there: once there is room, it goes on


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_small_disk(small_disk: Path) -> None:
    store = open_store(str(small_disk / "store"))
    uploads = Uploads(store, UploadBounds(spare_bytes=100 << 10))
    with pytest.raises(CapacityError, match="no room"):
        announce(uploads, bytes(5 << 20))
    content = make_tar({"model.onnx": os.urandom(3 << 20)})
    upload = announce(uploads, content)
    for offset in range(0, len(content), 1 << 20):
        uploads.append(upload, offset, content[offset : offset + (1 << 20)], now=NOW)
    with pytest.raises(CapacityError, match="full"):
        uploads.finish(upload, now=NOW)
    assert not list(store.blobs())
    big = announce(uploads, bytes(500 << 10), upload_id="u2")
    with pytest.raises(CapacityError, match="no room"):
        for offset in range(0, 500 << 10, 100 << 10):
            (small_disk / f"filler{offset}").write_bytes(bytes(100 << 10))
            uploads.append(big, offset, bytes(100 << 10), now=NOW)
    uploads.drop(upload)
    uploads.drop(big)
    content = make_tar({"model.onnx": os.urandom(1 << 20)})
    upload = announce(uploads, content)
    uploads.append(upload, 0, content, now=NOW)
    uploads.finish(upload, now=NOW)
    store.close()


# kill -9

_UPLOADER = textwrap.dedent("""
    import sys
    from dataclasses import replace
    from datetime import UTC, datetime
    from pathlib import Path
    from aiorch_server.registry.archives import ArchiveFormat
    from aiorch_server.registry.store import open_store
    from aiorch_server.registry.uploads import Upload, Uploads
    store = open_store(sys.argv[1])
    uploads = Uploads(store)
    now = datetime.now(UTC)
    print("ready", flush=True)
    for line in sys.stdin:
        name, size, sha256 = line.split()
        content = Path(sys.argv[2], name).read_bytes()
        upload = Upload("digits", name, "ann", ArchiveFormat.TAR, int(size), sha256, datetime.max.replace(tzinfo=UTC))
        offset = uploads.received_bytes(upload)
        while offset < len(content):
            offset = uploads.append(upload, offset, content[offset:offset + 65536], now=now)
        digest = uploads.finish(upload, now=now).manifest.digest
        print(name, digest, flush=True)
        uploads.drop(upload)
""")


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Whatever is visible afterwards is whole, what was told is there, and every upload can be finished."""
    source, root, chance = tmp_path / "source", tmp_path / "store", random.Random(7)
    source.mkdir()
    lines = []
    for index in range(40):
        content = make_tar({"model.onnx": chance.randbytes(300_000), "more.bin": chance.randbytes(100_000)})
        (source / f"u{index}").write_bytes(content)
        lines.append(f"u{index} {len(content)} {hashlib.sha256(content).hexdigest()}\n")
    told: set[str] = set()
    kills = 0
    while len(told) < len(lines):
        process = subprocess.Popen(
            [sys.executable, "-c", _UPLOADER, root, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("".join(line for line in lines if line.split()[0] not in told))
        process.stdin.flush()
        if kills < 8:
            told |= {process.stdout.readline().split()[0] for _ in range(chance.randrange(3)) if len(told) < 30}
            time.sleep(chance.random() * 0.01)
            process.send_signal(signal.SIGKILL)
            kills += 1
        else:
            process.stdin.close()
        told |= {line.split()[0] for line in process.stdout}
        process.wait()
        if not process.stdin.closed:
            process.stdin.close()
        process.stdout.close()
        check(root)
    assert kills >= 3  # a machine that stands still lets more of them end
    store = open_store(str(root))
    assert len(list(store.blobs())) == 80
    assert store.upload_keys().keys() <= {announce_key(line.split()[0]) for line in lines}
    store.close()
    assert list((root / "staging").iterdir()) == []


def announce_key(name: str) -> str:
    return hashlib.sha256(f"digits\0{name}".encode()).hexdigest()[:40]


def check(root: Path) -> None:
    store = open_store(str(root))
    for blob in store.blobs():
        with store.open(blob.sha256) as file:
            assert hashlib.sha256(file.read()).hexdigest() == blob.sha256
    store.close()
    assert list((root / "staging").iterdir()) == []
