"""An HTTP/1.1 server for one ASGI application inside a running event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import uvicorn

from aiorch_server.frontends.rest.connection import BoundedProtocol, Patience

logger = logging.getLogger(__name__)
Application = Callable[..., Any]

_BACKLOG = 1024
_TICK_S = 1.0
#: How long answers that were given up at the end of the grace may take to leave.
_FLUSH_S = 1.0


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals belong to the process, which has other doors too."""

    def __init__(self, config: uvicorn.Config, tls: ssl.SSLContext | None, patience: Patience) -> None:
        super().__init__(config)
        self._tls = tls
        self._patience = patience
        self.is_listening = asyncio.Event()
        self.is_stopping = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self._tls is None:
            await super().startup(sockets=sockets)
        else:
            await self._listen_with_tls(sockets or [], self._tls)
        self.is_listening.set()

    async def _listen_with_tls(self, sockets: list[socket.socket], tls: ssl.SSLContext) -> None:
        """As uvicorn, which would leave asyncio's minute to clients that do not shake hands, or do not say goodbye."""
        create = partial(
            cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class),
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(
                create,
                sock=each,
                ssl=tls,
                backlog=_BACKLOG,
                ssl_handshake_timeout=self._patience.head_timeout_s,
                ssl_shutdown_timeout=_FLUSH_S,
            )
            for each in sockets
        ]
        self.started = True

    async def main_loop(self) -> None:
        # uvicorn's own loop wakes ten times a second to look for should_exit; once a second is enough for its clock.
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.is_stopping.wait(), _TICK_S)

    def request_stop(self) -> None:
        self.should_exit = True
        self.is_stopping.set()


def _refuse_two_lengths(app: Application) -> Application:
    """``app`` without requests that give both lengths: who is in front of us may have gone by the other one.

    RFC 9112, 6.3: such a request ought to be handled as an error, and the connection must be closed.
    """

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        names = {name for name, _ in scope["headers"]}
        if names.issuperset((b"content-length", b"transfer-encoding")):
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 400, "headers": headers})
            await send({"type": "http.response.body", "body": b"both Content-Length and Transfer-Encoding are given\n"})
            return
        await app(scope, receive, send)

    return serve


class HttpListener:
    """Serves ``app`` on ``host``:``port`` (0 picks a free port) with at most ``max_connections`` at a time.

    With ``tls`` it speaks HTTPS alone; ``app`` finds the certificate that a client has proved in the scope's state.
    """

    def __init__(
        self,
        app: Application,
        host: str,
        port: int,
        *,
        max_connections: int = 4096,
        patience: Patience | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        patience = patience or Patience()
        self._host = host
        self._port = port
        self._server = _Server(
            uvicorn.Config(
                _refuse_two_lengths(app),
                http=cast("type[asyncio.Protocol]", partial(BoundedProtocol, patience=patience)),
                h11_max_incomplete_event_size=patience.max_head_bytes,
                loop="none",
                interface="asgi3",
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=max_connections,
                backlog=_BACKLOG,
            ),
            tls,
            patience,
        )
        self._serving: asyncio.Task[None] | None = None

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._server.server_state.connections)

    async def start(self) -> int:
        """Listens and returns the bound port; OSError, naming the address, if that is impossible."""
        listener = await self._bind()
        port: int = listener.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name=f"http:{port}")
        listening = asyncio.ensure_future(self._server.is_listening.wait())
        try:
            await asyncio.wait((self._serving, listening), return_when=asyncio.FIRST_COMPLETED)
        finally:
            listening.cancel()
        if self._serving.done():
            listener.close()
            self._serving.result()
            raise OSError(f"the HTTP server on {self._host}:{port} ended while it started")
        return port

    async def stop(self, grace_s: float, on_impatience: Callable[[], None] | None = None) -> None:
        """Takes no new connections, lets running requests end for ``grace_s``, then closes what is left.

        ``on_impatience`` is called at the end of the grace; answers that it brings about are still sent.
        """
        if self._serving is None:
            return
        self._server.request_stop()
        await asyncio.wait({self._serving}, timeout=grace_s)
        if not self._serving.done() and on_impatience is not None:
            on_impatience()
            await asyncio.wait({self._serving}, timeout=_FLUSH_S)
        if not self._serving.done():
            await self._abort()
        serving, self._serving = self._serving, None
        await serving

    async def _abort(self) -> None:
        state = self._server.server_state
        logger.warning("closing %d HTTP connections at the end of the grace", len(state.connections))
        self._server.force_exit = True
        tasks = set(state.tasks)
        for connection in list(state.connections):
            connection.transport.abort()
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=_FLUSH_S)
            for task in stuck:
                task.cancel()

    async def _bind(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]
            listener = socket.create_server((address[0], address[1]), family=family, backlog=_BACKLOG)
            # Inherited by connections. asyncio sets it only for sockets that name their protocol, as these do not, and
            # the second part of an answer would wait for the client's delayed acknowledgement of the first.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise OSError(error.errno, f"cannot listen on {self._host}:{self._port}: {error.strerror}") from None
        listener.setblocking(False)
        return listener
