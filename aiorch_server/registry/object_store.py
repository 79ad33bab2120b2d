"""An artefact store in what fsspec reaches, above all S3: an object appears whole when its upload ends, or not at all.

``<address>/blobs/<two digits>/<sha256>`` hold content; ``<address>/uploads/<key>/<offset>-<length>`` the pieces of
uploads, so that any server can go on with one. Unpacking is done in a local folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import fsspec  # type: ignore[import-untyped, unused-ignore]

from aiorch_server.errors import AiorchError, Conflict, InvalidSettings, PreconditionFailed, StoreUnavailable
from aiorch_server.registry.scratch import Scratch, telling
from aiorch_server.registry.store import ArtefactStore, Blob, BlobMissing, UploadPieces, check_digest, check_key

#: An address that does not answer must be told within seconds.
_S3_CLIENT = {"connect_timeout": 3, "read_timeout": 30, "retries": {"max_attempts": 1}}
_READ_AHEAD_BYTES = 8 << 20
_LONGEST_TOLD = 300
_SHOWN_OPTIONS = ("endpoint_url", "region_name", "anon")


class ObjectStore(ArtefactStore):
    """Blobs as objects below one address."""

    def __init__(self, url: str, scratch: Path, options: Mapping[str, Any]) -> None:
        """``options`` are fsspec's storage options; their values are never told."""
        scheme, _, rest = url.partition("://")
        self.name = f"{scheme}://{rest.rpartition('@')[2]}"
        self._secrets = [value for value in _list_secrets(options) if len(value) >= 4]
        self._scratch = Scratch(scratch)
        settings = dict(options)
        if scheme in ("s3", "s3a"):
            settings["config_kwargs"] = {**_S3_CLIENT, **settings.get("config_kwargs", {})}
            # a listing that is remembered would hide what other servers do
            settings.setdefault("use_listings_cache", False)
        try:
            self._files, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, **settings)
        except Exception as error:
            self._scratch.close()
            if scheme in ("s3", "s3a") and isinstance(error, ImportError):
                needed = "S3 needs the extra 's3' (pip install 'aiorchestrator[s3]')"
                raise InvalidSettings(f"artefact store '{self.name}' cannot be used: {needed}: {error}") from None
            raise InvalidSettings(f"artefact store '{self.name}' cannot be used: {self._tell(error)}") from None
        self._root = root.rstrip("/")

    def put(self, sha256: str, path: Path) -> None:
        """See ArtefactStore.put."""
        target, size = self._path(sha256), path.stat().st_size
        with self.telling("storing a file"):
            self._files.put_file(str(path), target)
            stored = self._files.info(target)["size"]
        if stored != size:
            raise StoreUnavailable(f"artefact store {self.name} kept {stored} bytes of {size}; try again")

    @contextlib.contextmanager
    def open(self, sha256: str) -> Iterator[BinaryIO]:
        """See ArtefactStore.open."""
        path = self._path(sha256)
        with self.telling("reading a file"):
            try:
                with self._files.open(path, "rb", block_size=_READ_AHEAD_BYTES) as file:
                    yield file
            except FileNotFoundError:
                raise BlobMissing(f"{self.name} has no blob {sha256}") from None

    def find(self, sha256: str) -> Blob | None:
        """See ArtefactStore.find."""
        path = self._path(sha256)
        with self.telling("looking for a file"):
            try:
                return _describe(self._files.info(path))
            except FileNotFoundError:
                return None

    def blobs(self) -> Iterator[Blob]:
        """See ArtefactStore.blobs."""
        with self.telling("listing files"):
            for found in self._list(f"{self._root}/blobs"):
                with contextlib.suppress(ValueError):
                    check_digest(str(found["name"]).rpartition("/")[2])
                    yield _describe(found)

    def delete_if_older(self, sha256: str, stored_before: datetime) -> bool:
        """See ArtefactStore.delete_if_older."""
        found = self.find(sha256)
        if found is None or found.stored_at >= stored_before:
            return False
        with self.telling("deleting a file"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(sha256))
        return True

    def workspace(self) -> contextlib.AbstractContextManager[Path]:
        """See ArtefactStore.workspace."""
        return self._scratch.workspace()

    def free_bytes(self) -> int:
        """See ArtefactStore.free_bytes."""
        return self._scratch.free_bytes()

    def pieces(self, key: str) -> UploadPieces:
        """See ArtefactStore.pieces."""
        return _ObjectPieces(self, f"{self._root}/uploads/{check_key(key)}")

    def upload_keys(self) -> Mapping[str, datetime]:
        """See ArtefactStore.upload_keys."""
        found: dict[str, datetime] = {}
        with self.telling("listing uploads"):
            for each in self._list(f"{self._root}/uploads"):
                key = str(each["name"]).split("/")[-2]
                found[key] = max(_describe(each).stored_at, found.get(key, datetime.min.replace(tzinfo=UTC)))
        return found

    def close(self) -> None:
        """See ArtefactStore.close."""
        self._scratch.close()

    # for the pieces

    def list_pieces(self, folder: str) -> dict[int, int]:
        """Offset -> length of the longest piece that begins there."""
        lengths: dict[int, int] = {}
        with self.telling("listing an upload"):
            for found in self._list(folder):
                offset, _, length = str(found["name"]).rpartition("/")[2].partition("-")
                lengths[int(offset)] = max(int(length), lengths.get(int(offset), 0))
        return lengths

    def write_piece(self, path: str, content: bytes) -> None:
        """Stores one piece whole."""
        with self.telling("keeping an upload"):
            self._files.pipe_file(path, content)

    def read_piece(self, path: str) -> bytes:
        """One piece; Conflict where it is gone, because the upload was finished or dropped."""
        with self.telling("reading an upload"):
            try:
                return bytes(self._files.cat_file(path))
            except FileNotFoundError:
                raise Conflict("this upload was finished or dropped by another call") from None

    def remove_pieces(self, folder: str) -> None:
        """Removes all pieces."""
        with self.telling("dropping an upload"):
            for found in self._list(folder):
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(found["name"])

    @contextlib.contextmanager
    def telling(self, doing: str) -> Iterator[None]:
        """Turns whatever the store's client raises into StoreUnavailable."""
        try:
            yield
        except (AiorchError, GeneratorExit):
            raise
        except Exception as error:
            text = f"artefact store {self.name} does not answer: {doing} failed ({self._tell(error)})"
            raise StoreUnavailable(text) from None

    def _tell(self, error: BaseException) -> str:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        for secret in self._secrets:
            text = text.replace(secret, "...")
        return text[:_LONGEST_TOLD]

    def _list(self, folder: str) -> list[Mapping[str, Any]]:
        self._files.invalidate_cache()
        return [found for found in self._files.find(folder, detail=True).values() if found.get("type") == "file"]

    def _path(self, sha256: str) -> str:
        return f"{self._root}/blobs/{check_digest(sha256)[:2]}/{sha256}"


class _ObjectPieces(UploadPieces):
    """Objects named by offset and length; those that overlap hold the same bytes, or the checksum will tell."""

    def __init__(self, store: ObjectStore, folder: str) -> None:
        self._store = store
        self._folder = folder

    def received_bytes(self) -> int:
        """See UploadPieces.received_bytes."""
        return sum(length for _, length, _ in self._walk())

    def append(self, offset: int, chunk: bytes | memoryview) -> int:
        """See UploadPieces.append."""
        walked = list(self._walk())
        size = sum(length for _, length, _ in walked)
        if offset > size:
            raise PreconditionFailed(f"a piece at offset {offset} leaves a gap: {size} bytes have come")
        known = min(len(chunk), size - offset)
        if known and self._read(walked, offset, known) != bytes(chunk[:known]):
            raise Conflict(f"other bytes have come at offset {offset} already; begin a new upload")
        rest = bytes(chunk[known:])
        if rest:
            self._store.write_piece(f"{self._folder}/{size:020d}-{len(rest)}", rest)
        return size + len(rest)

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """See UploadPieces.open."""
        with self._store.workspace() as folder:
            path = folder / "archive"
            with telling(f"folder {folder.parent}", doing="keeping an upload"), path.open("wb") as file:
                for begin, length, name in self._walk():
                    file.write(self._take(name, begin, length))
            with path.open("rb") as file:
                yield file

    def drop(self) -> None:
        """See UploadPieces.drop."""
        self._store.remove_pieces(self._folder)

    def _walk(self) -> Iterator[tuple[int, int, str]]:
        """What to take of each piece to have all bytes once: where it begins in the upload, how many, whose."""
        end = 0
        for offset, length in sorted(self._store.list_pieces(self._folder).items()):
            if offset > end:
                return
            if offset + length > end:
                yield end, offset + length - end, f"{self._folder}/{offset:020d}-{length}"
                end = offset + length

    def _take(self, name: str, begin: int, length: int) -> bytes:
        skipped = begin - int(name.rpartition("/")[2].partition("-")[0])
        return self._store.read_piece(name)[skipped : skipped + length]

    def _read(self, walked: list[tuple[int, int, str]], offset: int, length: int) -> bytes:
        parts = []
        for begin, size, name in walked:
            low, high = max(begin, offset), min(begin + size, offset + length)
            if low < high:
                parts.append(self._take(name, begin, size)[low - begin : high - begin])
        return b"".join(parts)


def _list_secrets(options: Mapping[str, Any]) -> Iterator[str]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _list_secrets(value)
        elif isinstance(value, str) and key not in _SHOWN_OPTIONS:
            yield value


def _describe(found: Mapping[str, Any]) -> Blob:
    stored_at = found.get("LastModified") or found.get("created") or datetime.now(UTC)
    if stored_at.tzinfo is None:
        stored_at = stored_at.replace(tzinfo=UTC)
    return Blob(str(found["name"]).rpartition("/")[2], int(found["size"]), stored_at)
