"""The routes of the trace and logging extensions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from aiorch_server.config.restriction import Group
from aiorch_server.errors import RequestError
from aiorch_server.frontends.rest.documents import write_json
from aiorch_server.frontends.rest.planes import ManagementPlane
from aiorch_server.frontends.rest.tensor_json import name_json_type

Endpoint = Callable[[Request], Awaitable[Response]]
_LOGGED = (bool, int, str, type(None))


class SettingRoutes:
    """GET reads, POST changes and reads."""

    def __init__(
        self, controlplane: ManagementPlane, read_document: Callable[[Request], Awaitable[dict[str, Any]]]
    ) -> None:
        self._controlplane = controlplane
        self._read_document = read_document

    def list_routes(self) -> list[tuple[Group, str, tuple[str, ...], Endpoint]]:
        """Group, methods, paths and endpoint of each."""
        traces = ("/v2/trace/setting", "/v2/models/{model}/trace/setting")
        return [
            (Group.TRACE, "GET POST", traces, self._trace),
            (Group.LOGGING, "GET POST", ("/v2/logging",), self._log),
        ]

    async def _trace(self, request: Request) -> Response:
        changes = {}
        for name, value in (await self._read_changes(request)).items():
            words = [] if value is None else value if type(value) is list else [value]
            for word in words:
                if type(word) is not str:
                    raise RequestError(f"{name}: must be a string, but is {name_json_type(word)}")
            changes[name] = words
        settings = self._controlplane.trace_setting(request.path_params.get("model", ""), changes)
        return write_json({name: words if name == "trace_level" else words[0] for name, words in settings.items()})

    async def _log(self, request: Request) -> Response:
        changes = await self._read_changes(request)
        for name, value in changes.items():
            if type(value) not in _LOGGED:
                raise RequestError(f"{name}: must be a boolean, number or string, but is {name_json_type(value)}")
        return write_json(self._controlplane.log_settings(changes))

    async def _read_changes(self, request: Request) -> dict[str, Any]:
        return await self._read_document(request) if request.method == "POST" else {}
