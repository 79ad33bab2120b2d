"""What the header of an upload announces, checked, and what the registry knows of that upload already."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aiorch_proto.admin.v1 import registry_pb2 as pb
from aiorch_proto.admin.v1.service import METHODS

from aiorch_server.frontends.admin.caller import Caller
from aiorch_server.frontends.admin.convert_models import decode_provenance, encode_version
from aiorch_server.frontends.admin.fields import InvalidField, check_texts
from aiorch_server.frontends.admin.transactions import serialize, write_detail, write_request
from aiorch_server.registry import upload_rows, versions
from aiorch_server.registry.archives import ArchiveFormat
from aiorch_server.registry.idempotency import find_answer
from aiorch_server.registry.names import check_alias, check_model_name
from aiorch_server.registry.records import Provenance
from aiorch_server.registry.uploads import Upload

if TYPE_CHECKING:
    from aiorch_server.registry.session import Session

UPLOAD_VERSION: Final = METHODS["/aiorch.admin.v1.ModelRegistry/UploadVersion"]
_FORMATS: Final = {
    pb.ARCHIVE_FORMAT_TAR: ArchiveFormat.TAR,
    pb.ARCHIVE_FORMAT_TAR_GZ: ArchiveFormat.TAR_GZ,
    pb.ARCHIVE_FORMAT_ZIP: ArchiveFormat.ZIP,
}


@dataclass(frozen=True, slots=True)
class Announced:
    """What a stream's header says; ``told`` is what makes two of them the same request."""

    header: Any
    caller: Caller
    upload_id: str
    format: ArchiveFormat
    provenance: Provenance
    told: bytes
    detail: str

    @property
    def key(self) -> tuple[str, str]:
        """What names the upload."""
        return self.header.model, self.upload_id

    @property
    def owned_key(self) -> tuple[str, str, str]:
        """With whose it is: an id that was dropped may be somebody else's at once."""
        return *self.key, self.caller.name


def check_header(header: Any, caller: Caller) -> Announced:
    """What the header announces; raises for what the caller may not do, and for what can never be kept."""
    check_texts(header)
    if not header.model:
        raise InvalidField("header.model", "is empty; expected the name of a model")
    caller.require_model(header.model)
    check_model_name(header.model)
    format = _FORMATS.get(header.format)
    if format is None:
        names = ", ".join(pb.ArchiveFormat.Name(number) for number in _FORMATS)
        raise InvalidField("header.format", f"is {header.format}; expected one of {names}")
    if not 0 <= header.offset <= max(header.size_bytes, 0):
        raise InvalidField("header.offset", f"is {header.offset}; expected 0 to size_bytes, {header.size_bytes}")
    for alias in header.aliases:
        check_alias(alias)
    provenance = decode_provenance(header.provenance)
    versions.check_provenance(provenance)
    return Announced(
        header,
        caller,
        header.upload_id or uuid.uuid4().hex,
        format,
        provenance,
        write_request(UPLOAD_VERSION, header, "offset"),
        write_detail(header),
    )


def find_done(session: Session, announced: Announced) -> bytes | None:
    """The answer where the version was made before: to the same request, or of the same upload."""
    header, caller = announced.header, announced.caller
    answer = find_answer(session, caller.name, header.idempotency_key, announced.told)
    if answer is not None:
        return answer
    row = upload_rows.find_upload(session, *announced.key)
    if row is None or not row.version:
        return None
    if (row.sha256, row.size_bytes, row.created_by) != (header.sha256, header.size_bytes, caller.name):
        return None  # begin_upload says what is wrong
    return serialize(encode_version(versions.get_version(session, header.model, row.version)))


def build_upload(row: upload_rows.Upload) -> Upload:
    """The upload in the form that the store's side knows."""
    return Upload(
        model=row.model,
        upload_id=row.upload_id,
        principal=row.created_by,
        format=ArchiveFormat(row.archive_format),
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        expires_at=row.expires_at,
    )
