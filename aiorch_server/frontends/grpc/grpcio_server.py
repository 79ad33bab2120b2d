"""The ``--transport grpcio`` door: the same handlers on grpc.aio, for platforms without libnghttp2 and as an oracle."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import grpc

from aiorch_server.frontends.grpc.credentials import ServerCredentials
from aiorch_server.frontends.grpc.limits import ConnectionLife, list_channel_arguments
from aiorch_server.frontends.grpc.server import MAX_MESSAGE_BYTES


def create_grpcio_server(
    *,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    maximum_concurrent_rpcs: int | None = None,
    max_concurrent_streams: int = 1024,
    max_header_bytes: int = 16 << 10,
    executor: Executor | None = None,
    reuse_port: bool = False,
    life: ConnectionLife | None = None,
    compression: int | None = None,
    interceptors: Sequence[grpc.aio.ServerInterceptor] | None = None,
) -> Any:
    """A ``grpc.aio.Server`` of the running loop with the native door's limits; answers may have any size."""
    return grpc.aio.server(
        executor,
        interceptors=interceptors,
        compression=None if compression is None else grpc.Compression(compression),
        maximum_concurrent_rpcs=maximum_concurrent_rpcs,
        options=(
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", max_concurrent_streams),
            # Between the two, grpc refuses at random.
            ("grpc.max_metadata_size", max_header_bytes),
            ("grpc.absolute_max_metadata_size", max_header_bytes),
            ("grpc.so_reuseport", int(reuse_port)),
            *list_channel_arguments(life or ConnectionLife()),
        ),
    )


def make_grpcio_credentials(credentials: ServerCredentials) -> grpc.ServerCredentials:
    """Our credentials in the form that ``create_grpcio_server(...).add_secure_port`` takes."""
    return RenewableCredentials(credentials).for_port


class RenewableCredentials:
    """``for_port`` is for ``create_grpcio_server(...).add_secure_port``; ``renew`` changes what it stands for."""

    def __init__(self, credentials: ServerCredentials) -> None:
        self._latest = _configure(credentials)
        self.for_port: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
            self._latest, lambda: self._latest, require_client_authentication=credentials.require_client_auth
        )

    def renew(self, credentials: ServerCredentials) -> None:
        """Connections get these from now on; raises ValueError when key or certificates are not usable."""
        credentials.make_ssl_context()  # grpc would only log it
        self._latest = _configure(credentials)


def _configure(credentials: ServerCredentials) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(credentials.private_key, credentials.certificate_chain)], root_certificates=credentials.root_certificates
    )
