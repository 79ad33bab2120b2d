"""Blobs in a folder and in S3: whole or not there, found, listed, collected; what happens when the store is away."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from moto_server import SECRET, MotoServer

from aiorch_server.errors import InvalidSettings, RegistryUnavailable
from aiorch_server.registry.collect import collect_garbage
from aiorch_server.registry.object_store import ObjectStore
from aiorch_server.registry.store import ArtefactStore, BlobMissing, open_store


def put(store: ArtefactStore, content: bytes) -> str:
    sha256 = hashlib.sha256(content).hexdigest()
    with store.workspace() as folder:
        (folder / "0").write_bytes(content)
        store.put(sha256, folder / "0")
    return sha256


def read(store: ArtefactStore, sha256: str) -> bytes:
    with store.open(sha256) as file:
        return file.read()


@pytest.mark.parametrize("content", [b"", b"graph", os.urandom(3 << 20)], ids=["empty", "small", "large"])
def test_a_blob_comes_back(store: ArtefactStore, content: bytes) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    sha256 = put(store, content)
    assert read(store, sha256) == content
    found = store.find(sha256)
    assert found is not None
    assert (found.sha256, found.size_bytes) == (sha256, len(content))
    assert before < found.stored_at < datetime.now(UTC) + timedelta(seconds=2)
    assert put(store, content) == sha256
    assert [blob.sha256 for blob in store.blobs()] == [sha256]


def test_a_blob_that_is_not_there(store: ArtefactStore) -> None:
    sha256 = hashlib.sha256(b"nothing").hexdigest()
    assert store.find(sha256) is None
    with pytest.raises(BlobMissing, match=sha256), store.open(sha256):
        pass
    assert list(store.blobs()) == []
    assert not store.delete_if_older(sha256, datetime.now(UTC))


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65, "/" + "0" * 63])
def test_what_is_no_digest_never_becomes_a_path(store: ArtefactStore, digest: str) -> None:
    for call in (store.find, store.open, lambda each: store.put(each, Path("/dev/null"))):
        with pytest.raises(ValueError, match="SHA-256"):
            result = call(digest)
            with result:  # type: ignore[union-attr]
                pass
    for key in ("../x", "", "a/b", "a" * 201):
        with pytest.raises(ValueError, match="key"):
            store.pieces(key)


def test_a_blob_that_was_spoilt_is_healed_by_the_next_upload(folder_store: ArtefactStore, tmp_path: Path) -> None:
    sha256 = put(folder_store, b"graph")
    path = tmp_path / "store" / "blobs" / sha256[:2] / sha256
    path.chmod(0o600)
    path.write_bytes(b"grape")
    put(folder_store, b"graph")
    assert read(folder_store, sha256) == b"graph"


def test_garbage_is_what_is_old_and_referenced_by_nobody(store: ArtefactStore) -> None:
    kept, dropped = put(store, b"kept"), put(store, b"dropped!")
    now = datetime.now(UTC)
    asked = []

    def list_referenced() -> set[str]:
        asked.append(True)
        return {kept}

    assert collect_garbage(store, list_referenced, now=now, grace=timedelta(hours=1)) == 0
    assert not asked
    later = now + timedelta(hours=2)
    assert collect_garbage(store, list_referenced, now=later, grace=timedelta(hours=1)) == len(b"dropped!")
    assert [blob.sha256 for blob in store.blobs()] == [kept]
    with pytest.raises(BlobMissing), store.open(dropped):
        pass
    assert collect_garbage(store, list_referenced, now=later, grace=timedelta(hours=1)) == 0


def test_what_is_uploaded_again_while_garbage_is_collected_stays(folder_store: ArtefactStore, tmp_path: Path) -> None:
    sha256 = put(folder_store, b"graph")
    path = tmp_path / "store" / "blobs" / sha256[:2] / sha256
    os.utime(path, (0, 0))

    def upload_meanwhile() -> set[str]:
        put(folder_store, b"graph")
        return set()

    assert collect_garbage(folder_store, upload_meanwhile, now=datetime.now(UTC), grace=timedelta(hours=1)) == 0
    assert read(folder_store, sha256) == b"graph"


def test_references_that_cannot_be_read_delete_nothing(folder_store: ArtefactStore) -> None:
    sha256 = put(folder_store, b"graph")

    def fail() -> set[str]:
        raise RegistryUnavailable("the database is away")

    with pytest.raises(RegistryUnavailable):
        collect_garbage(folder_store, fail, now=datetime.now(UTC) + timedelta(days=9))
    assert read(folder_store, sha256) == b"graph"


def test_leftovers_are_swept_and_the_work_of_others_is_not(tmp_path: Path) -> None:
    root = tmp_path / "store"
    one = open_store(str(root))
    (root / "staging" / "left").mkdir()
    (root / "staging" / "left" / "half").write_bytes(b"x" * 100)
    with one.workspace() as folder:
        (folder / "0").write_bytes(b"graph")
        two = open_store(f"file://{root}")
        assert not (root / "staging" / "left").exists()
        one.put(hashlib.sha256(b"graph").hexdigest(), folder / "0")
    assert len(list(two.blobs())) == 1
    one.close()
    two.close()
    assert list((root / "staging").iterdir()) == []
    assert (root / "staging").stat().st_mode & 0o077 == 0


def test_strange_files_in_the_folder_are_no_blobs(folder_store: ArtefactStore, tmp_path: Path) -> None:
    sha256 = put(folder_store, b"graph")
    blobs = tmp_path / "store" / "blobs"
    (blobs / "notes.txt").write_text("x")
    (blobs / sha256[:2] / "notes.txt").write_text("x")
    assert [blob.sha256 for blob in folder_store.blobs()] == [sha256]


@pytest.mark.parametrize(
    ("url", "word"), [("", "not set"), ("s3://models/x", "local folder"), ("nosuch://x", "nosuch")]
)
def test_settings_that_cannot_work(tmp_path: Path, url: str, word: str) -> None:
    with pytest.raises(InvalidSettings, match=word):
        open_store(url, scratch=tmp_path if url.startswith("nosuch") else None)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryUnavailable, match="file/store"):
        open_store(str(tmp_path / "file" / "store"))


def everything(store: ArtefactStore, tmp_path: Path) -> dict[str, Callable[[], object]]:
    sha256 = hashlib.sha256(b"graph").hexdigest()
    (tmp_path / "graph").write_bytes(b"graph")
    return {
        "put": lambda: store.put(sha256, tmp_path / "graph"),
        "open": lambda: read(store, sha256),
        "find": lambda: store.find(sha256),
        "blobs": lambda: list(store.blobs()),
        "delete": lambda: store.delete_if_older(sha256, datetime.now(UTC)),
        "uploads": lambda: store.upload_keys(),
        "received": lambda: store.pieces("k").received_bytes(),
        "append": lambda: store.pieces("k").append(0, b"x"),
        "drop": lambda: store.pieces("k").drop(),
    }


def test_a_store_that_is_away_says_so_and_comes_back(tmp_path: Path) -> None:
    moto = MotoServer()
    options = {**moto.options, "client_kwargs": {"region_name": "us-east-1"}}
    store = open_store("s3://models/away", scratch=tmp_path / "scratch", options=options)
    put(store, b"before")
    moto.stop()
    for name, call in everything(store, tmp_path).items():
        began = time.monotonic()
        with pytest.raises(RegistryUnavailable, match="s3://models/away does not answer") as caught:
            call()
        assert time.monotonic() - began < 10, name
        assert SECRET not in str(caught.value)
    back = MotoServer(moto.port)
    try:
        assert read(store, put(store, b"after")) == b"after"
    finally:
        back.stop()
        store.close()


def test_a_bucket_that_is_not_there(tmp_path: Path, moto: MotoServer) -> None:
    store = open_store("s3://nosuchbucket", scratch=tmp_path / "scratch", options=moto.options)
    with pytest.raises(RegistryUnavailable, match="s3://nosuchbucket"):
        put(store, b"x")
    store.close()


def test_a_folder_that_went_away(folder_store: ArtefactStore, tmp_path: Path) -> None:
    put(folder_store, b"x")
    (tmp_path / "store").rename(tmp_path / "moved")
    calls = everything(folder_store, tmp_path)
    for name in ("put", "blobs", "append", "uploads"):
        with pytest.raises(RegistryUnavailable, match="store"):
            calls[name]()
    (tmp_path / "moved").rename(tmp_path / "store")
    put(folder_store, b"y")


def test_a_driver_that_is_missing_is_told_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", find_nothing)
    with pytest.raises(InvalidSettings, match=r"pip install 'aiorchestrator\[s3\]'"):
        ObjectStore("s3://models/aiorch", tmp_path, {})
