"""Models, versions and aliases; each method is an operation on a session of the registry's database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aiorch_proto.admin.v1 import registry_pb2 as pb

from aiorch_server.errors import Conflict
from aiorch_server.frontends.admin.caller import Caller
from aiorch_server.frontends.admin.convert_models import encode_model, encode_version
from aiorch_server.frontends.admin.fields import choose_paths
from aiorch_server.frontends.admin.model_events import tell, tell_alias, tell_registered
from aiorch_server.frontends.admin.pages import encode_page
from aiorch_server.registry import models, versions

if TYPE_CHECKING:
    from aiorch_server.frontends.admin.upload_service import UploadService
    from aiorch_server.registry.session import Session

_CHANGEABLE: Final = ("description", "labels")


class ModelRegistryServicer:
    """The service ModelRegistry; ``uploads`` takes new versions."""

    def __init__(self, uploads: UploadService) -> None:
        self.UploadVersion = uploads.take
        self.GetUpload = uploads.get

    def RegisterModel(self, session: Session, request: Any, caller: Caller) -> pb.Model:
        """Makes a model without versions."""
        model = models.register(
            session, request.name, actor=caller.name, description=request.description, labels=request.labels
        )
        tell_registered(session, caller, model.name)
        return encode_model(model)

    def GetModel(self, session: Session, request: Any, caller: Caller) -> pb.Model:
        """One model."""
        return encode_model(models.get(session, request.name))

    def UpdateModel(self, session: Session, request: Any, caller: Caller) -> pb.Model:
        """Changes what the mask names; Conflict where an etag is given and the model has another one by now."""
        given = request.model
        paths = choose_paths(request, given, _CHANGEABLE)
        before = models.get(session, given.name)
        if given.etag and given.etag != before.etag:
            raise Conflict(f"model '{given.name}' was changed meanwhile: its etag is {before.etag}, not the one given")
        model = models.update_model(
            session,
            given.name,
            description=given.description if "description" in paths else None,
            labels=given.labels if "labels" in paths else None,
        )
        if model != before:
            text = f"{' and '.join(paths)} of model {model.name} changed"
            tell(session, "model.updated", text, caller, model.name)
        return encode_model(model)

    def ListModels(self, session: Session, request: Any, caller: Caller) -> pb.ListModelsResponse:
        """A page of the models that the caller may see."""
        page = models.list_models(
            session,
            size=request.page_size,
            token=request.page_token,
            name_prefix=request.name_prefix,
            is_visible=caller.sees,
        )
        return encode_page(pb.ListModelsResponse(), "models", page, encode_model)

    def DeleteModel(self, session: Session, request: Any, caller: Caller) -> pb.DeleteModelResponse:
        """Takes a model without versions away."""
        models.delete_model(session, request.name)
        tell(session, "model.deleted", f"model {request.name} was deleted", caller, request.name)
        return pb.DeleteModelResponse()

    def GetVersion(self, session: Session, request: Any, caller: Caller) -> pb.ModelVersion:
        """One version by number or alias, or the latest."""
        found = versions.find_version(session, request.model, version=request.version, alias=request.alias)
        return encode_version(found)

    def ListVersions(self, session: Session, request: Any, caller: Caller) -> pb.ListVersionsResponse:
        """A page of a model's versions."""
        page = versions.list_versions(session, request.model, size=request.page_size, token=request.page_token)
        return encode_page(pb.ListVersionsResponse(), "versions", page, encode_version)

    def DeleteVersion(self, session: Session, request: Any, caller: Caller) -> pb.DeleteVersionResponse:
        """Takes a version away that nothing uses."""
        versions.delete_version(session, request.model, request.version)
        text = f"version {request.version} of model {request.model} was deleted"
        tell(session, "version.deleted", text, caller, request.model, request.version)
        return pb.DeleteVersionResponse()

    def SetAlias(self, session: Session, request: Any, caller: Caller) -> pb.Model:
        """Points an alias at a version, or takes it away."""
        before = models.get(session, request.model)
        model = models.set_alias(
            session, request.model, request.alias, request.version, expected_version=request.expected_version
        )
        if model != before:
            tell_alias(session, caller, request.model, request.alias, request.version)
        return encode_model(model)
