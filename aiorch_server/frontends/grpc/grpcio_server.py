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
    return grpc.ssl_server_credentials(
        [(credentials.private_key, credentials.certificate_chain)],
        root_certificates=credentials.root_certificates,
        require_client_auth=credentials.require_client_auth,
    )
