"""What the doors show their clients: TLS files are read when a door is opened, and followed until the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiorch_server.config.server import GrpcConfig, TlsConfig

if TYPE_CHECKING:
    from ssl import SSLContext

    from aiorch_server.frontends.grpc import ServerCredentials

HTTP = "http/1.1"


class Certificates:
    """The certificates of all doors. For the event loop; ``stop`` ends what follows the files."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def open_context(self, tls: TlsConfig, door: str) -> SSLContext | None:
        """What an HTTP door shows its clients, None for plain text; follows the files."""
        if tls.certificate is None or tls.key is None:
            return None
        from aiorch_server.frontends.grpc import CredentialFiles
        from aiorch_server.frontends.grpc.credentials import renew_ssl_context

        files = CredentialFiles(tls.certificate, tls.key, tls.root, tls.require_client_auth)
        stamp, context = files.stamp(), files.read().make_ssl_context(HTTP)

        def renew(credentials: ServerCredentials) -> None:
            renew_ssl_context(context, credentials.make_ssl_context(HTTP))

        if tls.reload_secs:
            self._tasks.append(asyncio.create_task(files.follow(stamp, renew, tls.reload_secs, door)))
        return context

    def bind(self, server: Any, config: GrpcConfig) -> int:
        """Binds the gRPC port and gives its number; OSError when it cannot be had. Follows the files of its TLS."""
        from aiorch_server.frontends import grpc as door

        port: int
        address, tls = config.write_address(config.port), config.tls
        try:
            if tls.certificate is None or tls.key is None:  # both are there, or none
                return int(server.add_insecure_port(address))
            files = door.CredentialFiles(tls.certificate, tls.key, tls.root, tls.require_client_auth)
            stamp, credentials = files.stamp(), files.read()
            if isinstance(server, door.GrpcDoor):
                renew: Callable[[ServerCredentials], None] = server.renew_credentials
                port = server.add_secure_port(address, credentials)
            else:
                renewable = door.RenewableCredentials(credentials)
                renew = renewable.renew
                port = server.add_secure_port(address, renewable.for_port)
        except RuntimeError as error:  # grpcio has no errno to tell
            raise OSError(f"cannot listen on {address}: {error}") from error
        if tls.reload_secs:
            self._tasks.append(asyncio.create_task(files.follow(stamp, renew, tls.reload_secs)))
        return port

    async def stop(self) -> None:
        """Follows the files no more."""
        for task in self._tasks:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
