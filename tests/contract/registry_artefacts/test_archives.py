"""Archives that are wrong, hostile or huge: each is refused with a text that says why, and nothing is left behind."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import subprocess
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from archives import Change, make_header, make_tar, make_tar_with, make_zip, pack, pad
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiorch_server.errors import PayloadTooLarge, RequestError
from aiorch_server.registry.archives import ArchiveBounds, ArchiveFormat, Unpacked, unpack

SMALL = ArchiveBounds(
    expanded_bytes=4 << 20, expansion_ratio=10, free_expansion_bytes=1 << 20, files=50, path_bytes=200, depth=5
)
TAR, TAR_GZ, ZIP = ArchiveFormat.TAR, ArchiveFormat.TAR_GZ, ArchiveFormat.ZIP


@pytest.fixture
def try_unpack(tmp_path: Path) -> Iterator[Callable[..., Unpacked]]:
    """Unpacks into ``tmp_path/staging/work``, and checks that nothing was ever written anywhere else."""
    around = tmp_path / "staging"
    (around / "beside").mkdir(parents=True)
    folder = around / "work"
    folder.mkdir()

    def try_(content: bytes, format: ArchiveFormat, bounds: ArchiveBounds = SMALL) -> Unpacked:
        return unpack(io.BytesIO(content), format, folder, bounds)

    yield try_
    assert sorted(path.name for path in tmp_path.iterdir()) == ["staging"]
    assert sorted(path.name for path in around.iterdir()) == ["beside", "work"]
    assert not list((around / "beside").iterdir())
    for path in folder.iterdir():
        assert path.name.isdecimal()
        assert stat.S_ISREG(path.lstat().st_mode)


def refused(call: Callable[[], object], *words: str) -> str:
    with pytest.raises(RequestError) as caught:
        call()
    text = str(caught.value)
    for word in words:
        assert word in text
    assert len(text) < 500
    assert text.isprintable()
    return text


BAD_NAMES = {
    "absolute": ("/etc/passwd", "relative"),
    "climbing": ("../../evil", "leads out"),
    "climbing inside": ("a/../../evil", "leads out"),
    "backslashes": ("a\\..\\..\\evil", "'\\'"),
    "drive": ("C:/evil", "relative"),
    "drive and backslash": ("C:\\evil", "relative"),
    "hidden": (".ssh/authorized_keys", "start with '.'"),
    "control character": ("a\nb", "print"),
    "right to left": ("abc\u202egpj.exe", "print"),
    "empty part": ("a//b", "empty"),
    "space at the end": ("a /b", "space"),
    "deep": ("a/" * 6 + "b", "deep"),
    "byte code": ("__pycache__/model.cpython-311.pyc", "compiled"),
    "10,000 characters": ("x" * 10_000, "200 bytes"),
    "10,000 folders": ("x/" * 5_000 + "y", "200 bytes"),
}


@pytest.mark.parametrize(("name", "word"), BAD_NAMES.values(), ids=BAD_NAMES.keys())
@pytest.mark.parametrize("format", [TAR, TAR_GZ, ZIP])
def test_a_name_that_is_no_path_here(
    try_unpack: Callable[..., Unpacked], format: ArchiveFormat, name: str, word: str
) -> None:
    files = {"model.onnx": b"graph", name: b"content"}
    content = make_zip(files) if format is ZIP else make_tar(files)
    refused(lambda: try_unpack(pack(content) if format is TAR_GZ else content, format), word)


def test_a_name_with_a_nul(try_unpack: Callable[..., Unpacked]) -> None:
    content = make_zip({"model.onnx_.txt": b"graph"}).replace(b"model.onnx_.txt", b"model.onnx\0.txt")
    refused(lambda: try_unpack(content, ZIP), "print")
    record = b"%d path=model.onnx\0.txt\n" % len(b"NN path=model.onnx\0.txt\n")
    tar = make_header(b"p", len(record), b"x") + pad(record) + make_header(b"model.onnx", 0) + bytes(1024)
    refused(lambda: try_unpack(tar, TAR), "print")


def test_a_name_that_is_not_utf8(try_unpack: Callable[..., Unpacked]) -> None:
    refused(lambda: try_unpack(make_header(b"m\xff\xfe", 0) + bytes(1024), TAR), "UTF-8")
    refused(lambda: try_unpack(make_zip({"mXY": b"graph"}).replace(b"mXY", b"m\xff\xfe"), ZIP), "UTF-8")
    record = b"11 path=\xff\xfe\n"
    tar = make_header(b"p", len(record), b"x") + pad(record) + make_header(b"model.onnx", 0) + bytes(1024)
    refused(lambda: try_unpack(tar, TAR), "UTF-8")


def link_to(target: str) -> Change:
    return lambda info: setattr(info, "linkname", target)


SPECIALS = {
    "symbolic link": (tarfile.SYMTYPE, link_to("/etc/passwd"), "symbolic link"),
    "hard link": (tarfile.LNKTYPE, link_to("model.onnx"), "hard link"),
    "character device": (tarfile.CHRTYPE, None, "device"),
    "block device": (tarfile.BLKTYPE, None, "device"),
    "pipe": (tarfile.FIFOTYPE, None, "pipe"),
    "sparse file": (tarfile.GNUTYPE_SPARSE, None, "sparse"),
    "long link": (tarfile.GNUTYPE_LONGLINK, None, "link"),
    "unknown": (b"Z", None, "type b'Z'"),
}


@pytest.mark.parametrize(("type_", "change", "word"), SPECIALS.values(), ids=SPECIALS.keys())
def test_a_tar_entry_that_is_no_file(
    try_unpack: Callable[..., Unpacked], type_: bytes, change: Change | None, word: str
) -> None:
    content = make_tar_with(("model.onnx", tarfile.REGTYPE, b"graph", None), ("evil", type_, b"", change))
    refused(lambda: try_unpack(content, TAR), word, "evil")


def test_a_file_below_a_link(try_unpack: Callable[..., Unpacked]) -> None:
    content = make_tar_with(("a", tarfile.SYMTYPE, b"", link_to("/tmp")), ("a/evil", tarfile.REGTYPE, b"x", None))
    refused(lambda: try_unpack(content, TAR), "symbolic link")


@pytest.mark.parametrize(
    ("mode", "word"), [(stat.S_IFLNK | 0o777, "symbolic"), (stat.S_IFIFO, "special"), (stat.S_IFCHR, "special")]
)
def test_a_zip_entry_that_is_no_file(try_unpack: Callable[..., Unpacked], mode: int, word: str) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo("evil")
        entry.external_attr = mode << 16
        archive.writestr(entry, "/etc/passwd")
    refused(lambda: try_unpack(buffer.getvalue(), ZIP), word)


CLASHES = {
    "twice": (["model.onnx", "model.onnx"], "twice"),
    "twice with a dot": (["model.onnx", "./model.onnx"], "twice"),
    "case": (["model.onnx", "Model.onnx"], "case"),
    "case of folders": (["a/x", "A/y"], "case"),
    "composed letters": (["\u00e9.txt", "e\u0301.txt"], "case"),
    "sharp s": (["stra\u00dfe", "strasse"], "case"),
    "file and folder": (["a", "a/b"], "folder"),
    "folder and file": (["a/b", "a"], "folder"),
    "two versions": (["1/model.onnx", "2/model.onnx"], "versions 1, 2"),
    "file with a version's name": (["7", "model.onnx"], "'7'"),
    "two configurations": (["config.pbtxt", "config.yaml"], "keep one"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize(("names", "word"), CLASHES.values(), ids=CLASHES.keys())
@pytest.mark.parametrize("format", [TAR, ZIP])
def test_names_that_cannot_stand_beside_each_other(
    try_unpack: Callable[..., Unpacked], format: ArchiveFormat, names: list[str], word: str
) -> None:
    if format is TAR:
        content = make_tar_with(*((name, tarfile.REGTYPE, b"x", None) for name in names))
    else:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")
        content = buffer.getvalue()
    refused(lambda: try_unpack(content, format), word)


@pytest.mark.parametrize("format", list(ArchiveFormat))
@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"PK", b"\x1f\x8b", b"not an archive at all" * 100, bytes(2048), bytes(10)],
    ids=["nothing", "zero", "pk", "gzip's mark", "text", "zeros", "ten zeros"],
)
def test_what_is_no_archive(try_unpack: Callable[..., Unpacked], format: ArchiveFormat, content: bytes) -> None:
    refused(lambda: try_unpack(content, format))


@pytest.mark.parametrize("announced", list(ArchiveFormat))
def test_another_format_than_announced(try_unpack: Callable[..., Unpacked], announced: ArchiveFormat) -> None:
    tar = make_tar({"model.onnx": b"graph"})
    for format, content in {TAR: tar, TAR_GZ: pack(tar), ZIP: make_zip({"model.onnx": b"graph"})}.items():
        if format is not announced:
            refused(lambda content=content: try_unpack(content, announced))


@pytest.mark.parametrize("format", list(ArchiveFormat))
def test_cut_off_anywhere(format: ArchiveFormat) -> None:
    files = {"model.onnx": os.urandom(700), "labels.txt": b"cat\ndog\n"}
    tar = make_tar(files, format=tarfile.USTAR_FORMAT)
    tar = tar[: tar.rindex(b"dog") + 4]
    tar = pad(tar) + bytes(512)
    content = {TAR: tar, TAR_GZ: pack(tar), ZIP: make_zip(files)}[format]
    for size in range(0, len(content), 7):
        with pytest.raises(RequestError):
            try_unpack_fresh(content[:size], format)


def try_unpack_fresh(content: bytes, format: ArchiveFormat, bounds: ArchiveBounds = SMALL) -> Unpacked:
    with tempfile.TemporaryDirectory() as folder:
        return unpack(io.BytesIO(content), format, Path(folder), bounds)


def test_something_after_the_end(try_unpack: Callable[..., Unpacked]) -> None:
    tar = make_tar({"model.onnx": b"graph"})
    refused(lambda: try_unpack(tar + b"MZ", TAR), "follows")
    refused(lambda: try_unpack_fresh(tar + make_tar({"other": b""}), TAR), "follows")
    refused(lambda: try_unpack_fresh(pack(tar + b"x"), TAR_GZ), "follows")
    refused(lambda: try_unpack_fresh(pack(tar) + b"x", TAR_GZ), "follows")
    refused(lambda: try_unpack_fresh(pack(tar) + pack(tar), TAR_GZ), "follows")
    packed = make_zip({"model.onnx": b"graph"})
    refused(lambda: try_unpack_fresh(packed + b"x", ZIP), "follows")
    refused(lambda: try_unpack_fresh(b"x" + packed, ZIP), "before")
    refused(lambda: try_unpack_fresh(packed + packed, ZIP), "before")


def test_a_broken_header_is_not_the_end(try_unpack: Callable[..., Unpacked]) -> None:
    tar = bytearray(make_tar_with(("a", tarfile.REGTYPE, b"x", None), ("b", tarfile.REGTYPE, b"x", None)))
    tar[1024] ^= 1
    refused(lambda: try_unpack(bytes(tar), TAR), "damaged")


@pytest.mark.parametrize(
    "field",
    [
        b"\x80" + b"\xff" * 11,
        b"\xff" * 12,
        b"-0000000001\0",
        b"7" * 11 + b"\0",
        b"abcdefghijk\0",
        b"\x80" + bytes(7) + b"\xff" * 4,
    ],
)
def test_a_size_that_lies(try_unpack: Callable[..., Unpacked], field: bytes) -> None:
    refused(lambda: try_unpack(make_header(b"model.onnx", 0, field=field) + bytes(2048), TAR))


@pytest.mark.parametrize(
    "record",
    [
        b"0 path=x\n",
        b"99 path=x\n",
        b"path=x\n",
        b"9 path=xx",
        b"-9 path=x\n",
        b"11 size=-1\n",
        b"10 size=x\n",
        b"\xff",
    ],
)
def test_a_pax_header_that_is_damaged(try_unpack: Callable[..., Unpacked], record: bytes) -> None:
    tar = make_header(b"p", len(record), b"x") + pad(record) + make_header(b"model.onnx", 0) + bytes(1024)
    refused(lambda: try_unpack(tar, TAR), "pax")


def test_pax_tricks(try_unpack: Callable[..., Unpacked]) -> None:
    """The size and path that count are those which are checked."""
    for key, value, word in (
        (b"path", b"../evil", "leads out"),
        (b"size", b"99999999999999", "more than"),
        (b"GNU.sparse.realsize", b"99999999999999", "sparse"),
    ):
        rest = b" %s=%s\n" % (key, value)
        record = b"%d%s" % (len(rest) + 2, rest)
        tar = make_header(b"p", len(record), b"x") + pad(record) + make_header(b"model.onnx", 0) + bytes(1024)
        refused(lambda tar=tar: try_unpack_fresh(tar, TAR), word)
        if key in (b"path", b"size"):
            tar = make_header(b"p", len(record), b"g") + pad(record) + make_header(b"model.onnx", 0) + bytes(1024)
            refused(lambda tar=tar: try_unpack_fresh(tar, TAR), "global")
    name = b"../evil\0"
    tar = make_header(b"L", len(name), b"L") + pad(name) + make_header(b"model.onnx", 0) + bytes(1024)
    refused(lambda: try_unpack(tar, TAR), "leads out")


@pytest.mark.parametrize("type_", [b"x", b"g", b"L", b"X"])
def test_an_extended_header_as_large_as_memory(try_unpack: Callable[..., Unpacked], type_: bytes) -> None:
    tar = pack(make_header(b"p", 256 << 20, type_) + bytes(64 << 20))
    tracemalloc.start()
    try:
        refused(lambda: try_unpack(tar, TAR_GZ), "extended header")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_gzip_of_zeros(try_unpack: Callable[..., Unpacked]) -> None:
    tar = make_tar({"model.onnx": bytes(3 << 20)})
    assert "bomb" in refused(lambda: try_unpack(pack(tar), TAR_GZ))
    endless = pack(make_tar({"model.onnx": b"x"}) + bytes(64 << 20))
    tracemalloc.start()
    try:
        refused(lambda: try_unpack_fresh(endless, TAR_GZ), "more than")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_zip_bombs(try_unpack: Callable[..., Unpacked]) -> None:
    tracemalloc.start()
    try:
        assert "bomb" in refused(lambda: try_unpack(make_zip({"model.onnx": bytes(3 << 20)}), ZIP))
        many = make_zip({f"{index}.bin": bytes(200 << 10) for index in range(40)})
        refused(lambda: try_unpack_fresh(many, ZIP), "bomb")
        refused(lambda: try_unpack_fresh(overlap(many), ZIP))
    finally:
        tracemalloc.stop()


def overlap(packed: bytes) -> bytes:
    """All entries of the directory point to the first one's data."""
    content = bytearray(packed)
    at = content.find(b"PK\1\2")
    while at >= 0:
        content[at + 42 : at + 46] = bytes(4)
        at = content.find(b"PK\1\2", at + 4)
    return bytes(content)


@pytest.mark.parametrize("size", [0, 1, 5, 7, 1 << 19, 2**32 - 2])
def test_a_zip_entry_whose_size_lies(try_unpack: Callable[..., Unpacked], size: int) -> None:
    content = bytearray(make_zip({"model.onnx": b"graphs"}))
    at = content.find(b"PK\1\2")
    content[at + 24 : at + 28] = struct.pack("<L", size)
    refused(lambda: try_unpack(bytes(content), ZIP))


def test_a_zip_entry_with_a_wrong_checksum(try_unpack: Callable[..., Unpacked]) -> None:
    content = make_zip({"model.onnx": b"graph"}, method=zipfile.ZIP_STORED)
    refused(lambda: try_unpack(content.replace(b"graph", b"grape"), ZIP), "CRC")


def test_a_zip_that_is_encrypted_or_packed_by_other_means(try_unpack: Callable[..., Unpacked]) -> None:
    content = bytearray(make_zip({"model.onnx": b"graph"}))
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.find(mark) + offset] |= 1
    refused(lambda: try_unpack(bytes(content), ZIP), "encrypted")
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        content = bytearray(make_zip({"model.onnx": b"graph"}, method=method))
        refused(lambda content=content: try_unpack_fresh(bytes(content), ZIP), "deflate")


def test_too_many(try_unpack: Callable[..., Unpacked]) -> None:
    files = {f"{index}.bin": b"" for index in range(51)}
    refused(lambda: try_unpack(make_tar(files), TAR), "50 files")
    refused(lambda: try_unpack_fresh(make_zip(files), ZIP), "50 files")
    folders = make_tar_with(*((f"f{index}", tarfile.DIRTYPE, b"", None) for index in range(101)))
    refused(lambda: try_unpack_fresh(folders, TAR), "50 files")
    directory = make_zip({f"{index}": b"" for index in range(30_000)})
    tracemalloc.start()
    try:
        refused(lambda: try_unpack_fresh(directory, ZIP), "too many")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_too_large(try_unpack: Callable[..., Unpacked]) -> None:
    for format, content in {
        TAR: make_tar({"m.bin": bytes(5 << 20)}),
        ZIP: make_zip({"m.bin": bytes(5 << 20)}, method=0),
    }.items():
        with pytest.raises(PayloadTooLarge, match="more than 4194304 bytes"):
            try_unpack_fresh(content, format)


def test_a_configuration_that_cannot_be_read(try_unpack: Callable[..., Unpacked]) -> None:
    for name, content in (
        ("config.pbtxt", b"max_batch_size: {"),
        ("config.pbtxt", b"\xff\xfe"),
        ("config.yaml", b"a: [1"),
        ("config.yaml", b"[" * 20_000),
    ):
        refused(
            lambda name=name, content=content: try_unpack_fresh(make_tar({name: content, "model.onnx": b"g"}), TAR),
            "config",
        )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_whatever_bytes_come(data: st.DataObject) -> None:
    """No other error than RequestError, and nothing written but numbered files."""
    tar = make_tar({"model.onnx": b"graph" * 50, "a/" + "b" * 120: b"x", "config.yaml": b"a: 1"})
    seeds = {TAR: tar, TAR_GZ: pack(tar), ZIP: make_zip({"model.onnx": b"graph" * 50, "a/b": b"", "c/": b""})}
    format = data.draw(st.sampled_from(list(ArchiveFormat)))
    content = bytearray(data.draw(st.one_of(st.just(seeds[format]), st.binary(max_size=2000))))
    for _ in range(data.draw(st.integers(0, 6))):
        if content:
            at = data.draw(st.integers(0, len(content) - 1))
            content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    if format is TAR and content and data.draw(st.booleans()):
        repair(content)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "work"
        folder.mkdir()
        try:
            unpacked = unpack(io.BytesIO(bytes(content)), format, folder, SMALL)
        except RequestError as error:
            assert str(error).isprintable()
        else:
            for file, path in zip(unpacked.manifest.files, unpacked.paths, strict=True):
                assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
                assert ".." not in file.path.split("/")
                assert not file.path.startswith("/")
        assert [path.name for path in Path(name).iterdir()] == ["work"]
        assert all(path.name.isdecimal() and path.is_file() and not path.is_symlink() for path in folder.iterdir())


def repair(tar: bytearray) -> None:
    """Right checksums for all blocks that look like headers, so that more than the checksum is tried."""
    for at in range(0, len(tar) - 511, 512):
        if tar[at + 257 : at + 262] == b"ustar":
            tar[at + 148 : at + 156] = b" " * 8
            tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])


# and what is right


@pytest.mark.parametrize("format", list(ArchiveFormat))
def test_a_version(try_unpack: Callable[..., Unpacked], format: ArchiveFormat) -> None:
    files = {
        "model.onnx": b"graph",
        "config.pbtxt": b"max_batch_size: 8",
        "labels.txt": b"",
        "data/\u00e9.bin": b"\0" * 600,
    }
    tar = make_tar(files)
    content = {TAR: tar, TAR_GZ: pack(tar), ZIP: make_zip(files)}[format]
    unpacked = try_unpack(content, format)
    assert {
        file.path: path.read_bytes() for file, path in zip(unpacked.manifest.files, unpacked.paths, strict=True)
    } == files
    assert [file.path for file in unpacked.manifest.files] == sorted(files)
    assert all(file.sha256 == hashlib.sha256(files[file.path]).hexdigest() for file in unpacked.manifest.files)
    assert unpacked.manifest.size_bytes == sum(map(len, files.values()))
    assert not unpacked.has_code


def test_one_digest_whatever_the_archive() -> None:
    files = {"model.onnx": b"graph", "labels.txt": b"cat"}
    reverse = dict(reversed(files.items()))
    digests = {
        try_unpack_fresh(content, format).manifest.digest
        for format, content in (
            (TAR, make_tar(files)),
            (TAR, make_tar(reverse, format=tarfile.GNU_FORMAT)),
            (TAR, make_tar({f"./{name}": content for name, content in files.items()}, format=tarfile.USTAR_FORMAT)),
            (TAR_GZ, pack(make_tar(files))),
            (ZIP, make_zip(reverse)),
            (ZIP, make_zip(files, method=zipfile.ZIP_STORED)),
        )
    }
    assert len(digests) == 1
    assert try_unpack_fresh(make_tar({**files, "more": b""}), TAR).manifest.digest not in digests


def test_a_whole_model_folder() -> None:
    digests = set()
    for number in ("1", "7", "42"):
        unpacked = try_unpack_fresh(
            make_tar({"config.pbtxt": b"", f"{number}/model.onnx": b"graph", "labels.txt": b""}), TAR
        )
        assert [file.path for file in unpacked.manifest.files] == ["1/model.onnx", "config.pbtxt", "labels.txt"]
        digests.add(unpacked.manifest.digest)
    assert len(digests) == 1


def test_what_programs_write(try_unpack: Callable[..., Unpacked]) -> None:
    """GNU tar with folders and a leading dot, long names, odd modes; zlib's gzip; Python's zip of a folder."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        (source / "deep").mkdir()
        (source / "model.onnx").write_bytes(b"graph")
        (source / "model.onnx").chmod(0o4755)
        (source / "deep" / ("n" * 150)).write_bytes(b"x" * 513)
        for options in (["--format=gnu"], ["--format=pax"], ["--format=gnu", "-z"]):
            packed = subprocess.run(
                ["tar", *options, "-cf", "-", "-C", name, "."], capture_output=True, check=True
            ).stdout
            unpacked = try_unpack_fresh(packed, TAR_GZ if "-z" in options else TAR)
            assert [file.path for file in unpacked.manifest.files] == ["deep/" + "n" * 150, "model.onnx"]
    unpacked = try_unpack(make_tar({"model.onnx": b"g"}, change=lambda info: setattr(info, "mode", 0o6777)), TAR)
    assert stat.S_IMODE(unpacked.paths[0].stat().st_mode) == 0o600


ONNX = {"model.onnx": b"\x08\x07graph"}
INERT = {
    "graph": ONNX,
    "graph with weights": {**ONNX, "weights.bin": b"\0" * 10, "labels.txt": b"cat"},
    "graph by another name": {"net.onnx": b"g", "config.yaml": b"default_model_filename: net.onnx"},
    "backend written": {**ONNX, "config.pbtxt": b'backend: "onnxruntime"'},
    "platform written": {**ONNX, "config.pbtxt": b'platform: "onnxruntime_onnx"'},
    "skops": {"model.skops": b"PK\3\4zip"},
    "ensemble": {"config.pbtxt": b'platform: "ensemble" ensemble_scheduling { step { model_name: "a" } }'},
    "folder": {"config.pbtxt": b"", "3/model.onnx": b"g"},
}
CODE = {
    "python": {"model.py": b"class Model: ..."},
    "python beside a graph": {**ONNX, "helper.py": b""},
    "python in the version's folder": {"3/model.onnx": b"g", "lib/x.py": b""},
    "pickle": {"model.pkl": b"x"},
    "joblib": {"model.joblib": b"x"},
    "pickle by another name": {**ONNX, "weights.bin": b"\x80\x04\x95"},
    "TorchScript": {"model.pt": b"PK"},
    "exported program": {"model.pt2": b"PK"},
    "TorchScript by another name": {**ONNX, "weights.bin": b"PK\3\4"},
    "TensorFlow": {"model.savedmodel/saved_model.pb": b"x"},
    "Keras": {"model.keras": b"PK"},
    "library": {**ONNX, "ops.so": b"x"},
    "library by another name": {**ONNX, "ops.bin": b"\x7fELF"},
    "other backend": {**ONNX, "config.pbtxt": b'backend: "python"'},
    "other platform": {**ONNX, "config.pbtxt": b'platform: "pytorch_libtorch"'},
    "other file": {**ONNX, "x.weird": b"", "config.yaml": b"default_model_filename: x.weird"},
    "trusted types": {
        "model.skops": b"PK",
        "config.pbtxt": b'parameters { key: "trusted_types" value { string_value: "os.system" } }',
    },
    "operators": {**ONNX, "config.pbtxt": b'model_operations { op_library_filename: "x" }'},
    "unknown": {"data.bin": b"x"},
    "several": {**ONNX, "model.weird": b"x"},
    "capitals": {**ONNX, "HELPER.PY": b"x"},
}


@pytest.mark.parametrize("files", INERT.values(), ids=INERT.keys())
def test_what_runs_no_code(files: dict[str, bytes]) -> None:
    assert not try_unpack_fresh(make_tar(files), TAR).has_code


@pytest.mark.parametrize("files", CODE.values(), ids=CODE.keys())
def test_what_may_run_code(files: dict[str, bytes]) -> None:
    assert try_unpack_fresh(make_tar(files), TAR).has_code
