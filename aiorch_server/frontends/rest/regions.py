"""The routes of the shared memory extensions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from aiorch_server.errors import RequestError
from aiorch_server.exchange import refuse_cuda_region, refuse_cuda_status
from aiorch_server.frontends.rest.documents import write_json
from aiorch_server.frontends.rest.planes import ManagementPlane
from aiorch_server.frontends.rest.tensor_json import name_json_type

_UINT64_MAX = 2**64 - 1
Endpoint = Callable[[Request], Awaitable[Response]]


class RegionRoutes:
    """Status, register and unregister of both kinds of shared memory."""

    def __init__(
        self, controlplane: ManagementPlane, read_document: Callable[[Request], Awaitable[dict[str, Any]]]
    ) -> None:
        self._controlplane = controlplane
        self._read_document = read_document

    def list_routes(self) -> list[tuple[str, tuple[str, ...], Endpoint]]:
        """Method, paths and endpoint of each."""
        routes: list[tuple[str, tuple[str, ...], Endpoint]] = []
        for kind, status, register, unregister in (
            ("system", self._status, self._register, self._unregister),
            ("cuda", self._cuda_status, self._cuda_register, self._cuda_unregister),
        ):
            base = f"/v2/{kind}sharedmemory"
            region = base + "/region/{region}"
            routes += [
                ("GET", (f"{base}/status", f"{region}/status"), status),
                ("POST", (f"{region}/register",), register),
                ("POST", (f"{base}/unregister", f"{region}/unregister"), unregister),
            ]
        return routes

    async def _status(self, request: Request) -> Response:
        regions = self._controlplane.regions.list_regions(_region(request))
        return write_json(
            [{"name": r.name, "key": r.key, "offset": r.offset, "byte_size": r.byte_size} for r in regions]
        )

    async def _register(self, request: Request) -> Response:
        document = await self._read_document(request)
        key = document.get("key")
        if type(key) is not str:
            raise RequestError(_describe_wrong("key", "a string", document))
        offset = _read_size(document, "offset", 0)
        byte_size = _read_size(document, "byte_size", None)
        self._controlplane.regions.register(_region(request), key, offset, byte_size)
        return write_json(None)

    async def _unregister(self, request: Request) -> Response:
        self._controlplane.regions.unregister(_region(request))
        return write_json(None)

    async def _cuda_status(self, request: Request) -> Response:
        refuse_cuda_status(_region(request))
        return write_json([])

    async def _cuda_register(self, request: Request) -> Response:
        raise refuse_cuda_region(_region(request))

    async def _cuda_unregister(self, request: Request) -> Response:
        return write_json(None)


def _region(request: Request) -> str:
    name: str = request.path_params.get("region", "")
    return name


def _read_size(document: dict[str, Any], field: str, default: int | None) -> int:
    value = document.get(field, default)
    if type(value) is not int or not 0 <= value <= _UINT64_MAX:
        raise RequestError(_describe_wrong(field, "a number of bytes, 0 or more", document))
    return value


def _describe_wrong(field: str, expected: str, document: dict[str, Any]) -> str:
    if field not in document:
        return f"Shared memory register request has no '{field}' field"
    return f"{field}: must be {expected}, but is {name_json_type(document[field])}"
