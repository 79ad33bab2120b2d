"""The REST server: the V2 HTTP protocol over one data plane and one control plane."""

from __future__ import annotations

import asyncio
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from aiorch_server.config.restriction import Group
from aiorch_server.frontends.rest.body import Receive, Send
from aiorch_server.frontends.rest.generate import GenerateRoute, GenerateStreamRoute
from aiorch_server.frontends.rest.guard import RestGuard
from aiorch_server.frontends.rest.infer import InferRoute, describe_failure, respond
from aiorch_server.frontends.rest.listener import HttpListener
from aiorch_server.frontends.rest.planes import InferencePlane, ManagementPlane, RestLimits
from aiorch_server.frontends.restriction import AccessRules
from aiorch_server.frontends.unpacking import UnpackBudget

if TYPE_CHECKING:
    from ssl import SSLContext

    from starlette.applications import Starlette

    from aiorch_server.frontends.tfserving.rest import ServingRoute
    from aiorch_server.security.gate import Gate

#: TensorFlow Serving's protocol, whose paths do not mind the case.
_SERVING_PATH = re.compile(r"/v1/models(?:[/:]|$)", re.IGNORECASE)
_INFER_PATH = re.compile(r"/v2/models/([^/]+)(?:/versions/([0-9]+))?/(infer|generate|generate_stream)")


class RestServer:
    """Serves REST on ``host``:``port`` in the running event loop; installs no signal handlers.

    Both planes stay the caller's. ``port`` 0 picks a free port, which ``start`` returns. ``access`` says which calls
    need a header; it is looked at where a call is dispatched, so that no way of writing a path goes round it. With
    ``gate`` callers must say who they are; with ``tls`` the door speaks HTTPS alone.
    """

    def __init__(
        self,
        dataplane: InferencePlane,
        controlplane: ManagementPlane,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        limits: RestLimits | None = None,
        access: AccessRules | None = None,
        max_connections: int = 4096,
        gate: Gate | None = None,
        tls: SSLContext | None = None,
    ) -> None:
        access = self._access = access or AccessRules()
        limits = limits or RestLimits()
        budget = UnpackBudget()
        infer = InferRoute(dataplane, limits, budget)
        self._inference = {
            "infer": infer,
            "generate": GenerateRoute(dataplane, controlplane, limits, budget),
            "generate_stream": GenerateStreamRoute(dataplane, controlplane, limits, budget),
        }
        self._serving_parts = (controlplane, infer, limits, budget, access)
        self._control_parts = (controlplane, limits, budget, access)
        self._control: Starlette | None = None
        self._opening = asyncio.Lock()
        self._listener = HttpListener(
            self._serve if gate is None else RestGuard(self._serve, gate),
            host,
            port,
            max_connections=max_connections,
            patience=limits.patience,
            tls=tls,
        )

    @cached_property
    def _serving(self) -> ServingRoute:
        """Imported with the first request: most servers never meet one."""
        from aiorch_server.frontends.tfserving.rest import ServingRoute

        return ServingRoute(*self._serving_parts)

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return self._listener.connections

    async def start(self) -> int:
        """Listens and returns the bound port; OSError if the address cannot be had."""
        return await self._listener.start()

    async def stop(self, grace_s: float = 30.0) -> None:
        """Takes no new requests and answers the running ones, at the end of ``grace_s`` with 503."""
        await self._listener.stop(grace_s, self._abandon)

    def _abandon(self) -> None:
        for route in self._inference.values():
            route.abandon()

    async def _serve(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        # Inference goes past the framework: routing tables and middleware cost as much as the whole request.
        matched = _INFER_PATH.fullmatch(scope["path"])
        if matched is not None:
            refusal = self._access.find_refusal((Group.INFERENCE,), scope["headers"])
            if refusal is not None:
                status, body, headers = describe_failure(refusal)
                await respond(send, status, headers, body)
                return
            await self._inference[matched[3]](scope, receive, send, matched[1], matched[2] or "")
        elif _SERVING_PATH.match(scope["path"]) is not None:
            await self._serving(scope, receive, send)
        else:
            control = self._control or await self._open_control()
            await control(scope, receive, send)

    async def _open_control(self) -> Starlette:
        async with self._opening:
            if self._control is None:
                self._control = await asyncio.to_thread(_build_control, *self._control_parts)
        return self._control


def _build_control(
    controlplane: ManagementPlane, limits: RestLimits, budget: UnpackBudget, access: AccessRules
) -> Starlette:
    """Imports the web framework: 1 MB that a server does without until it is asked something beside inference."""
    from aiorch_server.frontends.rest.control import ControlRoutes

    return ControlRoutes(controlplane, limits, budget, access).build_app()
