"""The calls of the service ModelRegistry."""

from __future__ import annotations

from collections.abc import Mapping

from aiorch_proto.admin.v1 import registry_pb2 as pb

from aiorch_client.admin.calls import Call, ListCall, forget
from aiorch_client.admin.messages import decode_model, decode_upload, decode_version
from aiorch_client.admin.types import Model, ModelVersion, Upload


def register_model(name: str, description: str, labels: Mapping[str, str]) -> Call[Model]:
    """Makes a model without versions."""
    request = pb.RegisterModelRequest(name=name, description=description, labels=labels)
    return Call("ModelRegistry.RegisterModel", request, decode_model)


def get_model(name: str) -> Call[Model]:
    """One model."""
    return Call("ModelRegistry.GetModel", pb.GetModelRequest(name=name), decode_model)


def update_model(name: str, description: str | None, labels: Mapping[str, str] | None, etag: str) -> Call[Model]:
    """Changes what is not None."""
    request = pb.UpdateModelRequest(model=pb.Model(name=name, description=description, labels=labels, etag=etag))
    given = {"description": description, "labels": labels}
    request.update_mask.paths.extend(path for path, value in given.items() if value is not None)
    return Call("ModelRegistry.UpdateModel", request, decode_model)


def list_models(prefix: str) -> ListCall[Model]:
    """Models by name."""
    return ListCall("ModelRegistry.ListModels", pb.ListModelsRequest(name_prefix=prefix), "models", decode_model)


def delete_model(name: str) -> Call[None]:
    """Takes a model away."""
    return Call("ModelRegistry.DeleteModel", pb.DeleteModelRequest(name=name), forget)


def get_upload(model: str, upload_id: str) -> Call[Upload]:
    """How far an upload is."""
    return Call("ModelRegistry.GetUpload", pb.GetUploadRequest(model=model, upload_id=upload_id), decode_upload)


def get_version(model: str, version: int, alias: str) -> Call[ModelVersion]:
    """One version; neither number nor alias: the latest."""
    request = pb.GetVersionRequest(model=model, version=version, alias=alias)
    return Call("ModelRegistry.GetVersion", request, decode_version)


def list_versions(model: str) -> ListCall[ModelVersion]:
    """Versions, the highest first."""
    return ListCall("ModelRegistry.ListVersions", pb.ListVersionsRequest(model=model), "versions", decode_version)


def delete_version(model: str, version: int) -> Call[None]:
    """Takes a version away."""
    return Call("ModelRegistry.DeleteVersion", pb.DeleteVersionRequest(model=model, version=version), forget)


def set_alias(model: str, alias: str, version: int, expected_version: int) -> Call[Model]:
    """Points an alias at a version, 0: takes it away."""
    request = pb.SetAliasRequest(model=model, alias=alias, version=version, expected_version=expected_version)
    return Call("ModelRegistry.SetAlias", request, decode_model)
