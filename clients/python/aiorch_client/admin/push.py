"""The upload of a version, without I/O: begun, cut off, and gone on with where the server says."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import grpc
from aiorch_proto.admin.v1 import registry_pb2 as pb

from aiorch_client.admin import registry_calls
from aiorch_client.admin.archive import Archive, ArchiveFormat, open_archive
from aiorch_client.admin.calls import AdminLayer
from aiorch_client.admin.messages import decode_version, encode_provenance
from aiorch_client.admin.origin import find_git_commit, guess_framework
from aiorch_client.admin.types import ModelVersion, Provenance
from aiorch_client.errors import NotFoundError, RequestError, from_rpc_error
from aiorch_client.steps import Send, Steps

#: Called with the bytes that were sent so far, and those of the whole archive.
Progress = Callable[[int, int], None]
#: Of the whole upload.
UPLOAD_LIMIT_S: Final = 24 * 3600.0
_METHOD: Final = "ModelRegistry.UploadVersion"
#: A stream that ended with one of these may be gone on with: what came stays at the server. ABORTED is its word for an
#: earlier stream of the same upload that is not over yet, INTERNAL grpc.aio's for a message that could not be written.
_INTERRUPTED: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.INTERNAL)
_FORMATS: Final = {
    ArchiveFormat.TAR: pb.ARCHIVE_FORMAT_TAR,
    ArchiveFormat.TAR_GZ: pb.ARCHIVE_FORMAT_TAR_GZ,
    ArchiveFormat.ZIP: pb.ARCHIVE_FORMAT_ZIP,
}


@dataclass(frozen=True, slots=True)
class SendArchive(Send):
    """Call a method with the messages of an upload; ``request`` is its header."""

    archive: Archive
    progress: Progress | None

    def messages(self, failures: list[Exception]) -> Iterator[Any]:
        """What is sent; ends early where the files cannot be read, with the reason in ``failures``."""
        header = self.request
        yield pb.UploadVersionRequest(header=header)
        sent = header.offset
        try:
            for piece in self.archive.read(sent):
                yield pb.UploadVersionRequest(chunk=piece)
                sent += len(piece)
                if self.progress is not None:
                    self.progress(sent, header.size_bytes)
        except Exception as error:  # kept for the caller: in gRPC's thread nobody would see it
            failures.append(error)


@dataclass(frozen=True, slots=True)
class Package:
    """An archive with what is said of it, ready to be uploaded."""

    archive: Archive
    header: Any


def prepare(
    model: str,
    path: str | Path,
    *,
    aliases: Sequence[str],
    provenance: Provenance | None,
    is_origin_looked_up: bool,
    create_model: bool,
    upload_id: str,
) -> Package:
    """Reads all files once, for the checksum; blocks. RequestError for what cannot be uploaded."""
    archive = open_archive(path)
    told = provenance or Provenance()
    if is_origin_looked_up:
        told = replace(
            told,
            framework=told.framework or guess_framework(archive),
            git_commit=told.git_commit or find_git_commit(Path(path)),
        )
    header = pb.UploadHeader(
        model=model,
        upload_id=upload_id or str(uuid.uuid4()),
        format=_FORMATS[archive.format],
        size_bytes=archive.size_bytes,
        sha256=archive.digest(),
        provenance=encode_provenance(told),
        create_model=create_model,
        aliases=aliases,
        idempotency_key=str(uuid.uuid4()),
    )
    return Package(archive, header)


def upload(
    layer: AdminLayer, package: Package, progress: Progress | None, timeout_s: float | None, *, is_continued: bool
) -> Steps[ModelVersion]:
    """Sends the archive; a connection that is cut is made anew as long as more arrives each few attempts."""
    header = package.header
    deadline_s = layer.start_deadline(timeout_s or UPLOAD_LIMIT_S)
    attempt, furthest = 0, 0
    if is_continued:
        done = yield from _find_place(layer, header)
        if done is not None:
            return done
    while True:
        attempt += 1
        try:
            remaining_s = layer.remaining_s(deadline_s, _METHOD)
            reply = yield SendArchive(_METHOD, header, remaining_s, package.archive, progress)
            return decode_version(reply)
        except grpc.RpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            if error.code not in _INTERRUPTED:
                raise error from rpc_error
            pause = layer.pause(attempt, error, deadline_s)
            if pause is None or attempt >= layer.max_attempts:
                raise error from rpc_error
        yield pause
        done = yield from _find_place(layer, header)
        if done is not None:
            return done
        if header.offset > furthest:
            attempt, furthest = 0, header.offset


def _find_place(layer: AdminLayer, header: Any) -> Steps[ModelVersion | None]:
    """Sets where the next piece belongs; the version where it was made and only the answer was lost."""
    try:
        found = yield from layer.call(registry_calls.get_upload(header.model, header.upload_id), None)
    except NotFoundError:
        header.offset = 0
        return None
    if found.version:
        return (yield from layer.call(registry_calls.get_version(header.model, found.version, ""), None))
    if found.received_bytes > header.size_bytes:
        raise RequestError(
            f"upload {header.upload_id} has {found.received_bytes} bytes at the server, the archive only "
            f"{header.size_bytes}: they are different ones; push again without this upload's id",
            code=grpc.StatusCode.FAILED_PRECONDITION,
        )
    header.offset = found.received_bytes
    return None
