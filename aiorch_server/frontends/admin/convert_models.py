"""Models and versions: records of the registry as messages of the admin API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiorch_proto.admin.v1 import registry_pb2 as pb

from aiorch_server.frontends.admin.fields import encode_time
from aiorch_server.registry.records import Model, ModelVersion, Provenance, TensorSignature


def encode_model(model: Model) -> pb.Model:
    """A model as its message."""
    message = pb.Model(
        name=model.name,
        description=model.description,
        labels=model.labels,
        aliases=model.aliases,
        latest_version=model.latest_version,
        created_by=model.created_by,
        etag=model.etag,
    )
    encode_time(model.created_at, message.created_at)
    return message


def encode_version(version: ModelVersion) -> pb.ModelVersion:
    """A version with all its files as its message."""
    message = pb.ModelVersion(
        model=version.model,
        version=version.version,
        digest=version.manifest.digest,
        size_bytes=version.manifest.size_bytes,
        provenance=encode_provenance(version.provenance),
        aliases=version.aliases,
        created_by=version.created_by,
        has_code=version.has_code,
    )
    for file in version.manifest.files:
        message.files.add(path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
    encode_time(version.created_at, message.created_at)
    return message


def encode_provenance(provenance: Provenance) -> pb.Provenance:
    """Where a version comes from, as its message."""
    return pb.Provenance(
        framework=provenance.framework,
        framework_version=provenance.framework_version,
        inputs=_encode_tensors(provenance.inputs),
        outputs=_encode_tensors(provenance.outputs),
        metrics=provenance.metrics,
        data_hash=provenance.data_hash,
        git_commit=provenance.git_commit,
        description=provenance.description,
        labels=provenance.labels,
    )


def decode_provenance(message: pb.Provenance) -> Provenance:
    """Where a version comes from, as the uploader says."""
    return Provenance(
        framework=message.framework,
        framework_version=message.framework_version,
        inputs=_decode_tensors(message.inputs),
        outputs=_decode_tensors(message.outputs),
        metrics=dict(message.metrics),
        data_hash=message.data_hash,
        git_commit=message.git_commit,
        description=message.description,
        labels=dict(message.labels),
    )


def _encode_tensors(tensors: Iterable[TensorSignature]) -> list[Any]:
    return [pb.TensorSignature(name=each.name, datatype=each.datatype, shape=each.shape) for each in tensors]


def _decode_tensors(messages: Iterable[Any]) -> tuple[TensorSignature, ...]:
    return tuple(TensorSignature(each.name, each.datatype, tuple(each.shape)) for each in messages)
