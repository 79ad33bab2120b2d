"""Models, versions and where they come from, as the admin client gives and takes them.

The shapes of proto/aiorch/admin/v1/registry.proto, which says what each field means. Times are aware, in UTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class TensorSignature:
    """A tensor of a version's signature; ``shape`` as in the V2 protocol's metadata."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a version comes from, as its author says."""

    framework: str = ""
    framework_version: str = ""
    inputs: tuple[TensorSignature, ...] = ()
    outputs: tuple[TensorSignature, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    data_hash: str = ""
    git_commit: str = ""
    description: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ArtefactFile:
    """One file of a version; ``sha256`` is 64 hexadecimal digits."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Model:
    """A registered model; ``aliases`` maps names such as prod to versions, ``latest_version`` 0: it has none."""

    name: str
    description: str
    labels: Mapping[str, str]
    aliases: Mapping[str, int]
    latest_version: int
    created_at: datetime | None
    created_by: str
    etag: str


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version; ``has_code``: loading it runs code of its author's choice."""

    model: str
    version: int
    digest: str
    size_bytes: int
    files: tuple[ArtefactFile, ...]
    provenance: Provenance
    aliases: tuple[str, ...]
    created_at: datetime | None
    created_by: str
    has_code: bool


@dataclass(frozen=True, slots=True)
class Upload:
    """How far an upload is; ``version`` is what was made of it, 0 before."""

    model: str
    upload_id: str
    size_bytes: int
    received_bytes: int
    expires_at: datetime | None
    version: int
