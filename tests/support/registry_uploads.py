"""Uploads into an artefact store."""

from __future__ import annotations

import hashlib
import uuid
from datetime import UTC, datetime

from archives import make_tar

from aiorch_server.registry.archives import ArchiveFormat
from aiorch_server.registry.store import ArtefactStore
from aiorch_server.registry.uploads import Finished, Upload, Uploads

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def announce(
    uploads: Uploads,
    content: bytes,
    *,
    format: ArchiveFormat = ArchiveFormat.TAR,
    upload_id: str = "u1",
    sha256: str = "",
) -> Upload:
    return uploads.begin(
        model="digits",
        upload_id=upload_id,
        principal="ann",
        format=format,
        size_bytes=len(content),
        sha256=sha256 or hashlib.sha256(content).hexdigest(),
        now=NOW,
    )


def push(store: ArtefactStore, files: dict[str, bytes]) -> Finished:
    """A whole upload."""
    uploads = Uploads(store)
    content = make_tar(files)
    upload = announce(uploads, content, upload_id=uuid.uuid4().hex)
    uploads.append(upload, 0, content, now=NOW)
    finished = uploads.finish(upload, now=NOW)
    uploads.drop(upload)
    return finished
