"""Versions on this machine: verified when made and when used again, shared, bounded, and whole after a crash."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from registry_uploads import push

from aiorch_server.errors import CapacityError, InvalidSettings, ModelLoadError, RegistryUnavailable
from aiorch_server.registry.checkout import Checkout
from aiorch_server.registry.manifests import make_manifest
from aiorch_server.registry.records import ArtefactFile, Manifest
from aiorch_server.registry.store import ArtefactStore

FILES = {"model.onnx": b"graph" * 100, "config.pbtxt": b"max_batch_size: 8", "data/weights.bin": b"w" * 3000}


@pytest.fixture
def manifest(folder_store: ArtefactStore) -> Manifest:
    return push(folder_store, FILES).manifest


@pytest.fixture
def cache(folder_store: ArtefactStore, tmp_path: Path) -> Iterator[Checkout]:
    checkout = Checkout(folder_store, tmp_path / "cache")
    yield checkout
    checkout.close()


def blob_of(tmp_path: Path, content: bytes) -> Path:
    sha256 = hashlib.sha256(content).hexdigest()
    return tmp_path / "store" / "blobs" / sha256[:2] / sha256


def count_trees(tmp_path: Path) -> int:
    return len(list((tmp_path / "cache" / "trees").iterdir()))


def spoil(path: Path, *, keep: bool = False) -> None:
    """Changes one byte; ``keep``: so that neither size nor time tell."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    if keep:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_blob_that_is_missing(cache: Checkout, manifest: Manifest, tmp_path: Path) -> None:
    blob_of(tmp_path, FILES["model.onnx"]).unlink()
    with pytest.raises(ModelLoadError, match=r"file 'model.onnx' of version 3 of model 'digits' is missing in"):
        cache.acquire("digits", 3, manifest)
    assert count_trees(tmp_path) == 0


@pytest.mark.parametrize("change", [b"", b"graph" * 101, b"graph" * 99 + b"grape", b"graph" * 99])
def test_a_blob_that_was_changed(cache: Checkout, manifest: Manifest, tmp_path: Path, change: bytes) -> None:
    path = blob_of(tmp_path, FILES["model.onnx"])
    path.chmod(0o600)
    path.write_bytes(change)
    with pytest.raises(ModelLoadError, match=r"'model.onnx' of version 3 of model 'digits' is not what was uploaded"):
        cache.acquire("digits", 3, manifest)
    assert count_trees(tmp_path) == 0
    path.write_bytes(FILES["model.onnx"])
    cache.acquire("digits", 3, manifest).release()


@pytest.mark.parametrize("after_restart", [False, True])
@pytest.mark.parametrize(
    "tamper",
    [
        spoil,
        lambda path: path.write_bytes(b"other"),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
    ],
    ids=["a byte", "all", "removed", "a folder", "a pipe", "a link"],
)
def test_a_file_that_was_changed_in_the_cache(
    folder_store: ArtefactStore,
    manifest: Manifest,
    tmp_path: Path,
    tamper: Callable[[Path], object],
    after_restart: bool,
) -> None:
    cache = Checkout(folder_store, tmp_path / "cache")
    tree = cache.acquire("digits", 3, manifest)
    path = tree.directory / "3" / "data" / "weights.bin"
    tree.release()
    if after_restart:
        cache.close()
        cache = Checkout(folder_store, tmp_path / "cache")
    tamper(path)
    try:
        anew = cache.acquire("digits", 3, manifest)  # what is no file any more is made anew
    except ModelLoadError as error:
        assert "file 'data/weights.bin' of version 3 of model 'digits' is not what was uploaded" in str(error)
        anew = cache.acquire("digits", 3, manifest)
    else:
        assert path.is_dir() or not path.exists()
    assert (anew.directory / "3" / "data" / "weights.bin").read_bytes() == FILES["data/weights.bin"]
    assert count_trees(tmp_path) == 1
    cache.close()


def test_a_change_that_hides_is_found_after_a_restart(
    folder_store: ArtefactStore, manifest: Manifest, tmp_path: Path
) -> None:
    cache = Checkout(folder_store, tmp_path / "cache")
    tree = cache.acquire("digits", 3, manifest)
    spoil(tree.directory / "3" / "model.onnx", keep=True)
    tree.release()
    cache.close()
    cache = Checkout(folder_store, tmp_path / "cache")
    with pytest.raises(ModelLoadError, match=r"model\.onnx"):
        cache.acquire("digits", 3, manifest)
    cache.close()


def test_a_change_of_time_alone_is_read_through_once(
    cache: Checkout, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    from aiorch_server.registry import checkout as module

    hash_file = module._hash
    monkeypatch.setattr(module, "_hash", lambda path: (read.append(path.name), hash_file(path))[1])
    tree = cache.acquire("digits", 3, manifest)
    cache.acquire("digits", 3, manifest)
    assert read == []
    os.utime(tree.directory / "3" / "model.onnx", (1, 1))
    cache.acquire("digits", 3, manifest)
    cache.acquire("digits", 3, manifest)
    assert read == ["model.onnx"]


def test_files_of_strangers_are_not_loaded(cache: Checkout, manifest: Manifest, tmp_path: Path) -> None:
    serving = cache.acquire("digits", 3, manifest)
    (serving.directory / "3" / "evil.py").write_text("")
    tree = cache.acquire("digits", 3, manifest)
    assert tree.directory != serving.directory
    assert not (tree.directory / "3" / "evil.py").exists()
    assert (serving.directory / "3" / "model.onnx").exists()  # what serves keeps its files
    serving.release()
    assert not serving.directory.exists()
    link = tree.directory / "config.pbtxt"
    link.unlink()
    link.symlink_to("/etc/passwd")
    tree.release()
    assert (cache.acquire("digits", 3, manifest).directory / "config.pbtxt").read_bytes() == FILES["config.pbtxt"]


def test_byte_code_beside_a_model_is_removed(cache: Checkout, folder_store: ArtefactStore) -> None:
    manifest = push(folder_store, {"model.py": b"x = 1", "lib/y.py": b""}).manifest
    tree = cache.acquire("digits", 1, manifest)
    for folder in ("1", "1/lib"):
        (tree.directory / folder / "__pycache__").mkdir()
        (tree.directory / folder / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"evil")
    again = cache.acquire("digits", 1, manifest)
    assert again.directory == tree.directory
    assert not list(tree.directory.rglob("__pycache__"))


def test_the_layout(cache: Checkout, folder_store: ArtefactStore, manifest: Manifest) -> None:
    tree = cache.acquire("digits", 3, manifest)
    assert tree.directory.name == "digits"
    for name, content in FILES.items():
        path = tree.directory / "3" / name
        assert path.read_bytes() == content
        assert stat.S_ISREG(path.lstat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) & ~0o444 == 0
        assert (tree.directory / name).read_bytes() == content  # what belongs to the model lies beside the version too
    files = {"config.pbtxt": b"", "8/model.onnx": b"graph", "8/data/x": b"", "labels.txt": b"cat"}
    tree = cache.acquire("digits", 4, push(folder_store, files).manifest)
    found = {path.relative_to(tree.directory).as_posix() for path in tree.directory.rglob("*") if path.is_file()}
    assert found == {"config.pbtxt", "4/model.onnx", "4/data/x", "labels.txt"}


def test_from_any_store(store: ArtefactStore, tmp_path: Path) -> None:
    manifest = push(store, {**FILES, "large.bin": os.urandom(9 << 20)}).manifest
    cache = Checkout(store, tmp_path / "cache")
    tree = cache.acquire("digits", 1, manifest)
    assert (tree.directory / "1" / "model.onnx").read_bytes() == FILES["model.onnx"]
    for blob in store.blobs():
        store.delete_if_older(blob.sha256, blob.stored_at.replace(year=2999))
    cache.acquire("digits", 1, manifest).release()  # what is here already needs no store
    with pytest.raises(ModelLoadError, match="is missing in artefact store"):
        cache.acquire("digits", 2, manifest)
    cache.close()


def test_a_store_that_is_away(cache: Checkout, manifest: Manifest, tmp_path: Path) -> None:
    tree = cache.acquire("digits", 1, manifest)
    blobs = tmp_path / "store" / "blobs"
    shutil.rmtree(blobs)
    blobs.write_text("no folder")
    with pytest.raises(RegistryUnavailable, match="does not answer"):
        cache.acquire("digits", 2, manifest)
    assert cache.acquire("digits", 1, manifest).directory == tree.directory


def test_the_bound_takes_what_was_not_used_for_longest(folder_store: ArtefactStore, tmp_path: Path) -> None:
    manifests = [push(folder_store, {"model.onnx": bytes([index]) * 1000}).manifest for index in range(4)]
    cache = Checkout(folder_store, tmp_path / "cache", most_bytes=2000)
    held = cache.acquire("m", 1, manifests[0])
    others = []
    for version in (2, 3, 4):
        tree = cache.acquire("m", version, manifests[version - 1])
        others.append(tree.directory)
        tree.release()
    assert held.directory.exists()
    assert [directory.exists() for directory in others] == [False, False, True]
    held.release()
    held.release()
    cache.close()
    cache = Checkout(folder_store, tmp_path / "cache", most_bytes=2000)  # the order survives
    cache.acquire("m", 2, manifests[1])
    assert not others[2].exists()
    assert held.directory.exists()
    cache.close()


def test_no_room(folder_store: ArtefactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = push(folder_store, FILES).manifest
    cache = Checkout(folder_store, tmp_path / "cache")
    old = cache.acquire("old", 1, manifest)
    old.release()
    monkeypatch.setattr("aiorch_server.registry.scratch.Scratch.free_bytes", lambda self: 100)
    with pytest.raises(CapacityError, match="no room for"):
        cache.acquire("digits", 1, manifest)
    assert not old.directory.exists()  # it was tried
    assert count_trees(tmp_path) == 0
    cache.close()


def test_many_at_once_make_one_tree(cache: Checkout, manifest: Manifest, tmp_path: Path) -> None:
    directories: list[Path] = []
    threads = [
        threading.Thread(target=lambda: directories.append(cache.acquire("digits", 1, manifest).directory))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(directories) == 16
    assert len(set(directories)) == 1
    assert count_trees(tmp_path) == 1


def test_a_folder_is_one_servers(folder_store: ArtefactStore, cache: Checkout, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from aiorch_server.registry.store import open_store;"
        "from aiorch_server.registry.checkout import Checkout;"
        "Checkout(open_store(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "store"), str(tmp_path / "cache")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert "InvalidSettings" in ended.stderr
    assert "another server" in ended.stderr
    with pytest.raises(InvalidSettings, match="give each its own"):
        Checkout(folder_store, tmp_path / "cache")


def test_what_a_killed_server_left(folder_store: ArtefactStore, manifest: Manifest, tmp_path: Path) -> None:
    cache = Checkout(folder_store, tmp_path / "cache")
    directory = cache.acquire("digits", 3, manifest).directory
    cache.close()
    half = tmp_path / "cache" / "staging" / "left" / "tree" / "digits"
    half.mkdir(parents=True)
    (half / "model.onnx").write_bytes(b"half")
    (tmp_path / "cache" / "trees" / "empty-1").mkdir()
    cache = Checkout(folder_store, tmp_path / "cache")
    assert not half.exists()
    assert count_trees(tmp_path) == 1
    assert cache.acquire("digits", 3, manifest).directory == directory
    cache.close()


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".x"])
def test_a_model_name_that_would_be_a_path(cache: Checkout, manifest: Manifest, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        cache.acquire(name, 1, manifest)


def test_an_empty_file(cache: Checkout, folder_store: ArtefactStore) -> None:
    manifest = make_manifest([ArtefactFile("model.onnx", 0, hashlib.sha256(b"").hexdigest())])
    with pytest.raises(ModelLoadError, match="missing"):
        cache.acquire("m", 1, manifest)
    manifest = push(folder_store, {"model.onnx": b""}).manifest
    assert (cache.acquire("m", 1, manifest).directory / "1" / "model.onnx").read_bytes() == b""
