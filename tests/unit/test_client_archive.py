"""What is uploaded: the same files give the same bytes, from any offset, and nothing that no server takes."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import time
from pathlib import Path

import pytest
from aiorch_client import RequestError
from aiorch_client.admin.archive import PIECE_BYTES, Archive, ArchiveFormat, open_archive
from aiorch_client.admin.origin import find_git_commit, guess_framework

FILES = {
    "config.pbtxt": b"max_batch_size: 8",
    "1/model.onnx": b"\1" * 70_000,
    "1/labels.txt": b"",
    "ü/" + "n" * 120: b"x",
}


def write(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES[name])
    return folder


def read(archive: Archive, offset: int = 0) -> bytes:
    return b"".join(archive.read(offset))


def test_the_same_files_are_the_same_bytes(tmp_path: Path) -> None:
    first = write(tmp_path / "a", list(FILES))
    second = write(tmp_path / "b", list(reversed(FILES)))
    os.chmod(second / "config.pbtxt", 0o755)  # noqa: PTH101
    os.utime(second / "1" / "model.onnx", (time.time() - 1000,) * 2)
    assert read(open_archive(first)) == read(open_archive(second))
    changed = open_archive(second)
    (second / "config.pbtxt").write_bytes(b"max_batch_size: 9")
    assert open_archive(second).digest() != open_archive(first).digest()
    assert changed.size_bytes == open_archive(first).size_bytes


def test_any_tar_program_reads_it(tmp_path: Path) -> None:
    archive = open_archive(write(tmp_path, list(FILES)))
    content = read(archive)
    assert (len(content), hashlib.sha256(content).hexdigest()) == (archive.size_bytes, archive.digest())
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        entries = tar.getmembers()
        found = {entry.name: tar.extractfile(entry).read() for entry in entries}  # type: ignore[union-attr]
    assert found == FILES
    assert [entry.name for entry in entries] == sorted(FILES) == list(archive.names)
    assert {(e.uid, e.gid, e.uname, e.gname, e.mtime, e.mode) for e in entries} == {(0, 0, "", "", 0, 0o644)}


def test_reading_begins_anywhere(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(bytes(range(256)) * 10_000)
    (tmp_path / "note.txt").write_bytes(b"n")
    archive = open_archive(tmp_path)
    whole = read(archive)
    for offset in (0, 1, 511, 512, 513, 100_000, PIECE_BYTES, len(whole) - 1025, len(whole) - 1, len(whole)):
        assert read(archive, offset) == whole[offset:], offset
    pieces = list(archive.read())
    assert {len(piece) for piece in pieces[:-1]} == {PIECE_BYTES}


@pytest.mark.parametrize(
    ("name", "stored", "framework"),
    [
        ("digits.onnx", "model.onnx", "onnxruntime"),
        ("net.pt2", "model.pt2", "pytorch"),
        ("tree.skops", "model.skops", "sklearn"),
        ("model.py", "model.py", "python"),
        ("weights.bin", "weights.bin", ""),
    ],
)
def test_a_single_file_is_called_as_its_backend_expects(tmp_path: Path, name: str, stored: str, framework: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    archive = open_archive(tmp_path / name)
    assert (archive.names, guess_framework(archive)) == ((stored,), framework)


def test_frameworks_of_folders(tmp_path: Path) -> None:
    saved = tmp_path / "digits"
    (saved / "variables").mkdir(parents=True)
    (saved / "saved_model.pb").write_bytes(b"x")
    (saved / "variables" / "variables.index").write_bytes(b"x")
    archive = open_archive(saved)
    assert archive.names == ("model.savedmodel/saved_model.pb", "model.savedmodel/variables/variables.index")
    assert guess_framework(archive) == "tensorflow"
    assert guess_framework(open_archive(write(tmp_path / "whole", list(FILES)))) == "onnxruntime"
    (tmp_path / "whole" / "1" / "model.py").write_bytes(b"x")
    assert guess_framework(open_archive(tmp_path / "whole")) == "", "two may be it, so nobody knows"


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("m.tar", ArchiveFormat.TAR),
        ("m.tar.gz", ArchiveFormat.TAR_GZ),
        ("m.TGZ", ArchiveFormat.TAR_GZ),
        ("m.zip", ArchiveFormat.ZIP),
    ],
)
def test_archives_go_as_they_are(tmp_path: Path, name: str, format: ArchiveFormat) -> None:
    (tmp_path / name).write_bytes(b"bytes")
    archive = open_archive(tmp_path / name)
    assert (archive.format, read(archive), read(archive, 2)) == (format, b"bytes", b"tes")


def test_what_no_server_takes_is_left_out_or_refused(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_bytes(b"x")
    for hidden in (".git/config", "__pycache__/model.pyc", ".DS_Store"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"x")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "model.py")
    assert open_archive(tmp_path).names == ("linked.txt", "model.py")
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(RequestError, match="link to a folder"):
        open_archive(tmp_path)
    (tmp_path / "loop").unlink()
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    with pytest.raises(RequestError, match="gone' cannot be read: No such file"):
        open_archive(tmp_path)
    (tmp_path / "gone").unlink()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="neither a file nor a folder"):
        open_archive(tmp_path)
    with pytest.raises(RequestError, match="neither a file nor a folder"):
        open_archive(tmp_path / "pipe")
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        open_archive(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="holds no files"):
        open_archive(tmp_path / "empty")
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / os.fsdecode(b"\xff")).write_bytes(b"x")
    with pytest.raises(RequestError, match="not UTF-8"):
        open_archive(odd)


def test_files_that_change_meanwhile_are_told(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x" * 100)
    archive = open_archive(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"x" * 99)
    with pytest.raises(RequestError, match="has changed"):
        archive.digest()
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(RequestError, match="cannot be read"):
        archive.digest()


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    assert find_git_commit(tmp_path) == ""

    def git(*arguments: str) -> str:
        import subprocess

        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "model.py").write_text("x")
    git("add", ".")
    git("commit", "-qm", "m")
    commit = git("rev-parse", "HEAD")
    assert find_git_commit(tmp_path) == find_git_commit(tmp_path / "model.py") == commit
    (tmp_path / "model.py").write_text("y")
    assert find_git_commit(tmp_path) == f"{commit}-dirty"
