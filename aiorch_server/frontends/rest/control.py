"""Every route but inference: health, metadata, configuration, statistics, the model repository."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from aiorch_server.config.restriction import Group
from aiorch_server.errors import (
    AiorchError,
    InternalError,
    NotFoundError,
    PayloadTooLarge,
    RequestError,
    UnsupportedRequest,
)
from aiorch_server.frontends.rest.body import receive_body
from aiorch_server.frontends.rest.documents import show_index, show_model, show_server, show_statistics, write_json
from aiorch_server.frontends.rest.infer_json import parse_document
from aiorch_server.frontends.rest.planes import ManagementPlane, RestLimits
from aiorch_server.frontends.rest.regions import RegionRoutes
from aiorch_server.frontends.rest.settings import SettingRoutes
from aiorch_server.frontends.rest.status import error_body, headers_of, status_of
from aiorch_server.frontends.rest.tensor_json import name_json_type
from aiorch_server.frontends.restriction import AccessRules
from aiorch_server.frontends.telling import tell
from aiorch_server.frontends.unpacking import UnpackBudget

logger = logging.getLogger(__name__)
Endpoint = Callable[[Request], Awaitable[Response]]

_FILE_PREFIX = "file:"
#: Bound of the documents that bring no files.
_MAX_DOCUMENT_BYTES = 64 * 1024
#: Bound of the arrays, objects and their elements in a load request.
_MAX_LOAD_ELEMENTS = 100_000


class VersionConvertor(StringConvertor):
    """A version in a path is decimal digits; "latest" or "-1" is no such path (404), as in Triton."""

    regex = "[0-9]+"


register_url_convertor("version", VersionConvertor())


class ControlRoutes:
    """The endpoints over one control plane."""

    def __init__(
        self, controlplane: ManagementPlane, limits: RestLimits, budget: UnpackBudget, access: AccessRules
    ) -> None:
        self._controlplane = controlplane
        self._limits = limits
        self._budget = budget
        self._access = access

    def build_app(self) -> Starlette:
        """The application with all routes; answers are written by hand because the protocol fixes their shape."""
        model = "/v2/models/{model}"
        version = model + "/versions/{version:version}"
        repository = "/v2/repository/{repository}"
        regions = RegionRoutes(self._controlplane, self._read_document)
        routes = []
        for group, method, paths, endpoint in (
            (Group.METADATA, "GET", ("/openapi.json",), _show_openapi),
            (Group.METADATA, "GET", ("/v2",), self._server_metadata),
            (Group.HEALTH, "GET", ("/v2/health/live",), self._server_live),
            (Group.HEALTH, "GET", ("/v2/health/ready",), self._server_ready),
            (Group.STATISTICS, "GET", ("/v2/models/stats", f"{model}/stats", f"{version}/stats"), self._statistics),
            (Group.HEALTH, "GET", (f"{model}/ready", f"{version}/ready"), self._model_ready),
            (Group.MODEL_CONFIG, "GET", (f"{model}/config", f"{version}/config"), self._model_config),
            (Group.METADATA, "GET", (model, version), self._model_metadata),
            (Group.MODEL_REPOSITORY, "POST", ("/v2/repository/index", f"{repository}/index"), self._index),
            (Group.MODEL_REPOSITORY, "POST", ("/v2/repository/models/{model}/load",), self._load),
            (Group.MODEL_REPOSITORY, "POST", ("/v2/repository/models/{model}/unload",), self._unload),
            (
                Group.MODEL_REPOSITORY,
                "POST",
                (f"{repository}/models/{{model}}/load", f"{repository}/models/{{model}}/unload"),
                _named_repository,
            ),
            *((Group.SHARED_MEMORY, *each) for each in regions.list_routes()),
            *SettingRoutes(self._controlplane, self._read_document).list_routes(),
        ):
            routes += [Route(path, self._guard(group, endpoint), methods=method.split()) for path in paths]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _show_http_error})
        app.router.redirect_slashes = False
        return app

    def _guard(self, group: Group, endpoint: Endpoint) -> Endpoint:
        """``endpoint`` for who may call it, its errors as error documents; a fault of ours is logged and not shown."""

        async def serve(request: Request) -> Response:
            try:
                self._access.check((group,), request.scope["headers"])
                return await endpoint(request)
            except AiorchError as error:
                return Response(error_body(tell(error)), status_of(error), headers_of(error), "application/json")
            except Exception:
                logger.exception("%s %s failed on a fault of this server", request.method, request.url.path)
                fault = InternalError("internal error while serving the request; the server's log says more")
                return Response(error_body(str(fault)), status_of(fault), media_type="application/json")

        return serve

    async def _server_metadata(self, request: Request) -> Response:
        return write_json(show_server(self._controlplane.server_metadata()))

    async def _server_live(self, request: Request) -> Response:
        return _readiness(self._controlplane.is_live())

    async def _server_ready(self, request: Request) -> Response:
        if self._controlplane.is_ready():
            return _readiness(True)
        problems = dict(self._controlplane.readiness_problems())
        if not problems:
            return _readiness(False)
        answer = write_json({"ready": False, "models": problems})
        answer.status_code = HTTPStatus.BAD_REQUEST.value
        return answer

    async def _model_ready(self, request: Request) -> Response:
        try:
            return _readiness(self._controlplane.model_ready(*_target(request)))
        except NotFoundError:
            return _readiness(False)

    async def _model_metadata(self, request: Request) -> Response:
        await self._controlplane.bring(*_target(request))
        return write_json(show_model(self._controlplane.model_metadata(*_target(request))))

    async def _model_config(self, request: Request) -> Response:
        await self._controlplane.bring(*_target(request))
        return write_json(self._controlplane.model_config(*_target(request)).to_dict())

    async def _statistics(self, request: Request) -> Response:
        return write_json(show_statistics(self._controlplane.statistics(*_target(request))))

    async def _index(self, request: Request) -> Response:
        document = await self._read_document(request)
        ready = document.get("ready", False)
        if type(ready) is not bool:
            raise RequestError(f"ready: must be a boolean, but is {name_json_type(ready)}")
        return write_json(show_index(self._controlplane.repository_index(ready)))

    async def _load(self, request: Request) -> Response:
        config: str | None = None
        files: dict[str, bytes] = {}
        for key, value in _read_parameters(await self._read_load(request)).items():
            path = f"parameters.{key}"
            if key != "config" and not key.startswith(_FILE_PREFIX):
                raise RequestError(f"{path}: is unknown; expected 'config' or 'file:<version>/<file name>'")
            if type(value) is not str:
                raise RequestError(f"{path}: must be a string, but is {name_json_type(value)}")
            if key == "config":
                config = value
                continue
            try:
                files[key.removeprefix(_FILE_PREFIX)] = base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                raise RequestError(f"{path}: is not valid base64") from None
        if files and config is None:
            raise RequestError(
                "parameters: 'file:...' needs 'config' as well, because such files stand in for the whole model"
            )
        await self._controlplane.load_model(request.path_params["model"], config, files)
        return write_json(None)

    async def _unload(self, request: Request) -> Response:
        dependents = _read_parameters(await self._read_document(request)).get("unload_dependents", False)
        if type(dependents) is not bool:
            raise RequestError(f"parameters.unload_dependents: must be a boolean, but is {name_json_type(dependents)}")
        await self._controlplane.unload_model(request.path_params["model"], dependents)
        return write_json(None)

    async def _read_document(self, request: Request) -> dict[str, Any]:
        async with receive_body(request.receive, request.scope["headers"], self._limits, self._budget) as body:
            return parse_document(body, _MAX_DOCUMENT_BYTES) if body else {}

    async def _read_load(self, request: Request) -> dict[str, Any]:
        async with receive_body(request.receive, request.scope["headers"], self._limits, self._budget) as body:
            # Files in base64 are cheap to parse, so the body's own limit holds for them; Python objects are not.
            elements = sum(map(body.count, (b"[", b"{", b",")))
            if elements > _MAX_LOAD_ELEMENTS:
                raise PayloadTooLarge(f"the load request has about {elements} elements, more than {_MAX_LOAD_ELEMENTS}")
            return parse_document(body, self._limits.max_body_bytes) if body else {}


async def _show_openapi(request: Request) -> Response:
    from aiorch_server.frontends.rest.openapi import render_openapi  # few ask

    return Response(render_openapi(), media_type="application/json")


async def _named_repository(request: Request) -> Response:
    raise UnsupportedRequest("'repository_name' specification is not supported")


async def _show_http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else HTTPStatus.INTERNAL_SERVER_ERROR.value
    headers = error.headers if isinstance(error, HTTPException) else None
    return Response(error_body(HTTPStatus(status).phrase), status, headers=headers, media_type="application/json")


def _target(request: Request) -> tuple[str, str]:
    return request.path_params.get("model", ""), request.path_params.get("version", "")


def _read_parameters(document: dict[str, Any]) -> dict[str, Any]:
    parameters = document.get("parameters", {})
    if type(parameters) is not dict:
        raise RequestError(f"parameters: must be an object, but is {name_json_type(parameters)}")
    return parameters


def _readiness(is_ready: bool) -> Response:
    return Response(status_code=HTTPStatus.OK.value if is_ready else HTTPStatus.BAD_REQUEST.value)
