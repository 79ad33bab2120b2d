"""The metrics door: GET /metrics for Prometheus, on a port of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from aiorch_server.frontends.rest.body import Receive, Send, choose_coding, encode_body, find_header
from aiorch_server.frontends.rest.guard import RestGuard
from aiorch_server.frontends.rest.listener import HttpListener
from aiorch_server.observability.machine import MachineProbe

if TYPE_CHECKING:
    from ssl import SSLContext

    from prometheus_client.registry import Collector

    from aiorch_server.observability.collector import DoorLedger, MeasuredModel
    from aiorch_server.security.gate import Gate

logger = logging.getLogger(__name__)
Exposition = Callable[[str | None], tuple[bytes, str]]

#: Scrapers are few; a limit of its own keeps a flood here away from the other doors' descriptors.
_MAX_CONNECTIONS = 64


class MetricsServer:
    """Serves the metrics of ``list_models()`` and ``list_ledgers()`` on ``host``:``port`` in the running event loop.

    ``own`` are collectors that are shown as well. Port 0 picks a free one. With ``gate`` callers must say who they are;
    with ``tls`` the door speaks HTTPS alone.
    """

    def __init__(
        self,
        list_models: Callable[[], Iterable[MeasuredModel]],
        *,
        list_ledgers: Callable[[], Iterable[DoorLedger]] = tuple,
        own: Iterable[Collector] = (),
        host: str = "127.0.0.1",
        port: int = 8002,
        gate: Gate | None = None,
        tls: SSLContext | None = None,
    ) -> None:
        # Utilization is that since the start: the first reading is now.
        self._parts = (list_models, list_ledgers, MachineProbe(), tuple(own))
        self._exposition: Exposition | None = None
        self._opening = asyncio.Lock()
        app = self._serve if gate is None else RestGuard(self._serve, gate)
        self._listener = HttpListener(app, host, port, max_connections=_MAX_CONNECTIONS, tls=tls)

    async def start(self) -> int:
        """Listens and returns the bound port; OSError if the address cannot be had."""
        return await self._listener.start()

    async def stop(self, grace_s: float = 1.0) -> None:
        """Closes the port; a scrape that runs may end within ``grace_s``."""
        await self._listener.stop(grace_s)

    async def _serve(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        headers: list[tuple[bytes, bytes]] = [(b"content-type", b"text/plain; charset=utf-8")]
        if scope["path"] != "/metrics":
            status, body = HTTPStatus.NOT_FOUND, b"Not Found; metrics are at /metrics\n"
        elif scope["method"] not in ("GET", "HEAD"):
            status, body = HTTPStatus.METHOD_NOT_ALLOWED, b"Method Not Allowed\n"
            headers.append((b"allow", b"GET, HEAD"))
        else:
            status, body = HTTPStatus.OK, b""
            try:
                body, content_type = await self._render(find_header(scope["headers"], b"accept"))
                headers = [(b"content-type", content_type.encode("ascii"))]
                coding = choose_coding(find_header(scope["headers"], b"accept-encoding"))
                body, coding = await encode_body(body, coding)
                if coding is not None:
                    headers.append((b"content-encoding", coding.encode("ascii")))
            except Exception:
                logger.exception("a scrape failed on a fault of this server")
                status, body = HTTPStatus.INTERNAL_SERVER_ERROR, b"the metrics could not be collected\n"
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": status.value, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _render(self, accept: str | None) -> tuple[bytes, str]:
        async with self._opening:
            if self._exposition is None:
                self._exposition = await asyncio.to_thread(_build_exposition, *self._parts)
        return self._exposition(accept)


def _build_exposition(
    list_models: Callable[[], Iterable[MeasuredModel]],
    list_ledgers: Callable[[], Iterable[DoorLedger]],
    probe: MachineProbe,
    own: Iterable[Collector],
) -> Exposition:
    """Imports Prometheus' library: 2 MB that a server does without until its first scrape."""
    from aiorch_server.observability.registry import build_exposition

    return build_exposition(list_models, list_ledgers, probe, own)
