"""The answers of GetModelMetadata and GetModelStatus."""

from __future__ import annotations

from typing import Any, Final

from aiorch_proto.tfserving import error_pb2, serving_pb2
from aiorch_proto.tfserving.service import TYPE_PREFIX

from aiorch_server.errors import RequestError
from aiorch_server.frontends.tfserving.models import (
    SIGNATURE,
    ModelCatalogue,
    ServableNotFound,
    Served,
    Wanted,
    resolve_version,
)
from aiorch_server.frontends.tfserving.tensors import NUMBERS
from aiorch_server.types import ModelIndexEntry, ModelSignature, ModelState, TensorSpec

PREDICT_METHOD: Final = "tensorflow/serving/predict"
_SIGNATURE_DEF: Final = "signature_def"
_STATES: Final = {
    ModelState.UNKNOWN: serving_pb2.ModelVersionStatus.START,
    ModelState.LOADING: serving_pb2.ModelVersionStatus.LOADING,
    ModelState.READY: serving_pb2.ModelVersionStatus.AVAILABLE,
    ModelState.UNLOADING: serving_pb2.ModelVersionStatus.UNLOADING,
    ModelState.UNAVAILABLE: serving_pb2.ModelVersionStatus.END,
}
#: The reason of a version that ended as it should (lifecycle/model.py).
_UNLOADED: Final = "unloaded"


def describe_model(model: Served, *, has_signature: bool = True) -> serving_pb2.ModelSpec:
    """The ModelSpec of an answer."""
    spec = serving_pb2.ModelSpec(name=model.name, signature_name=SIGNATURE if has_signature else "")
    spec.version.value = model.version
    return spec


def check_fields(fields: Any) -> None:
    """RequestError if GetModelMetadata asks for nothing, or for something else than signatures."""
    if not fields:
        raise RequestError("GetModelMetadataRequest must specify at least one metadata_field")
    for field in fields:
        if field != _SIGNATURE_DEF:
            raise RequestError(f"Metadata field {field} is not supported")


def encode_signatures(signature: ModelSignature) -> serving_pb2.SignatureDefMap:
    """The SignatureDefMap of a model."""
    signatures = serving_pb2.SignatureDefMap()
    definition = signatures.signature_def[SIGNATURE]
    definition.method_name = PREDICT_METHOD
    for specs, target in ((signature.inputs, definition.inputs), (signature.outputs, definition.outputs)):
        for spec in specs:
            _write_info(target[spec.name], spec, signature.max_batch_size)
    return signatures


def encode_metadata(model: Served) -> serving_pb2.GetModelMetadataResponse:
    """The answer of GetModelMetadata."""
    response = serving_pb2.GetModelMetadataResponse(model_spec=describe_model(model, has_signature=False))
    packed = response.metadata[_SIGNATURE_DEF]
    packed.type_url = f"{TYPE_PREFIX}SignatureDefMap"  # the name that clients know, not that of our package
    packed.value = encode_signatures(model.signature).SerializeToString()
    return response


def find_status(catalogue: ModelCatalogue, wanted: Wanted) -> serving_pb2.GetModelStatusResponse:
    """The answer of GetModelStatus, the highest version first; ServableNotFound if there is nothing to tell.

    A version that the next request loads is at its START: known, and nothing was done about it yet.
    """
    asked = resolve_version(catalogue, wanted)
    waiting = set(map(str, catalogue.waiting_versions(wanted.name)))
    entries = [
        each
        for each in catalogue.repository_index(False)
        if each.name == wanted.name and each.version and each.version not in waiting
    ]
    entries += [ModelIndexEntry(wanted.name, version, ModelState.UNKNOWN) for version in waiting]
    if asked:
        entries = [each for each in entries if each.version == asked]
    if not entries:
        if asked:
            raise ServableNotFound(f"Could not find version {asked} of model {wanted.name}")
        raise ServableNotFound(f"Could not find any versions of model {wanted.name}")
    response = serving_pb2.GetModelStatusResponse()
    for entry in sorted(entries, key=lambda entry: -int(entry.version)):
        status = response.model_version_status.add(version=int(entry.version), state=_STATES[entry.state])
        status.status.SetInParent()
        if entry.state is ModelState.UNAVAILABLE and entry.reason != _UNLOADED:
            status.status.error_code = error_pb2.UNKNOWN
            status.status.error_message = entry.reason
    return response


def _write_info(info: Any, spec: TensorSpec, max_batch_size: int) -> None:
    info.name = spec.name
    info.dtype = NUMBERS[spec.datatype]
    info.tensor_shape.SetInParent()
    for size in (-1, *spec.shape) if max_batch_size else spec.shape:
        info.tensor_shape.dim.add(size=size)
