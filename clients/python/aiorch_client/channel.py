"""Where and how to connect: address, TLS, channel options, call metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from aiorch_client.errors import RequestError, UnreachableError

Metadata = tuple[tuple[str, str | bytes], ...]

#: Sizes are the server's business. Pings come less often than the five minutes that gRPC servers tolerate from a quiet
#: connection; a peer that vanished is noticed after the keep-alive timeout because data stays unacknowledged.
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 330_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """TLS of a client; each value is a PEM file's path or the PEM bytes themselves.

    ``root`` None trusts the system's authorities. ``certificate`` and ``key`` (both or none) prove the client to a
    server that asks for it. ``server_name`` is the name to check in the server's certificate, None the address's own.
    """

    root: str | Path | bytes | None = None
    certificate: str | Path | bytes | None = None
    key: str | Path | bytes | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise RequestError("TLS: certificate and key come together; one of them is missing")

    def credentials(self) -> grpc.ChannelCredentials:
        """The channel credentials; RequestError naming a file that cannot be read."""
        return grpc.ssl_channel_credentials(
            root_certificates=_read_pem(self.root, "root"),
            private_key=_read_pem(self.key, "key"),
            certificate_chain=_read_pem(self.certificate, "certificate"),
        )


def channel_options(tls: TlsConfig | None) -> list[tuple[str, int | str]]:
    """The gRPC channel arguments of every connection of the SDK."""
    options: list[tuple[str, int | str]] = list(_OPTIONS)
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def check_target(target: str) -> str:
    """``target`` itself; RequestError where it is a web address or empty instead of ``host:port``."""
    if not target or "://" in target.removeprefix("dns://").removeprefix("unix://"):
        raise RequestError(f"'{target}' is no gRPC address: write host:port, for example '127.0.0.1:8001'")
    return target


def call_metadata(
    token: str | None, metadata: Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]]
) -> Metadata:
    """The metadata sent with every call; ``token`` becomes a bearer authorization. RequestError on a bad key."""
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    if token is not None:
        pairs.append(("authorization", f"Bearer {token}"))
    for key, value in pairs:
        if key != key.lower():
            raise RequestError(f"metadata key '{key}' must be lower case")
        if isinstance(value, bytes) != key.endswith("-bin"):
            raise RequestError(f"metadata '{key}': keys that end in '-bin' carry bytes, all others text")
    return tuple(pairs)


def unreachable(target: str, reason: str) -> UnreachableError:
    """The error for an address at which no server answers."""
    return UnreachableError(
        f"no server can be reached at '{target}' ({reason}); is it running, is the address right, has it TLS?",
        code=grpc.StatusCode.UNAVAILABLE,
        retryable=True,
    )


def _read_pem(source: str | Path | bytes | None, what: str) -> bytes | None:
    if source is None or isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise RequestError(f"TLS {what} '{source}' cannot be read: {error.strerror}") from error
