"""``aiorch status --ready``: whether a server takes requests.

Without ``--url`` it is the one of this machine's configuration.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aiorch_client import Client, ClientError, TlsConfig

from aiorch_server.cli.connection import CONNECT_S, ClientOutput, open_client
from aiorch_server.cli.output import CommandError, ExitCode, UsageError
from aiorch_server.config.load import load_server_config
from aiorch_server.config.restriction import Group
from aiorch_server.errors import InvalidSettings

if TYPE_CHECKING:
    from aiorch_server.config.server import GrpcConfig

_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "[::]": "[::1]"}
_MOST_NAMED: Final = 5


@dataclass(frozen=True)
class Door:
    """Where a server is asked, how, and with which headers."""

    url: str
    tls: TlsConfig | None = None
    token: str | None = None
    metadata: dict[str, str | bytes] = field(default_factory=dict)


def check_ready(output: ClientOutput, door: Door, timeout_s: float) -> None:
    """Says that the server is ready; CommandError with the reason where it is not, UnreachableError."""
    with open_client(
        door.url, timeout_s=timeout_s, tls=door.tls, token=door.token, metadata=tuple(door.metadata.items())
    ) as client:  # fmt: skip
        is_ready = client.is_ready()
        if not is_ready:
            raise CommandError(f"{door.url} is not ready{_find_reason(client)}", ExitCode.REFUSED, "NOT_READY")
    output.show({"url": door.url, "is_ready": True}, f"{door.url} is ready")


def _find_reason(client: Client) -> str:
    """The models that are not there; nothing where the server does not tell them, as to callers without credentials."""
    try:
        missing = [each for each in client.index() if each.state != "READY" and each.reason != "unloaded"]
    except ClientError:
        return ""
    named = [
        f"{each.name} {each.version}".strip() + f" {each.state}" + (f" ({each.reason})" if each.reason else "")
        for each in missing
    ]
    more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
    return f": {'; '.join(named[:_MOST_NAMED])}{more}" if named else ""


def find_door(file: Path | None, tls: TlsConfig | None) -> Door:
    """The gRPC door of the server that ``aiorch serve`` starts with this file and environment; UsageError.

    Its certificate is taken as it is shown, for the machine asks itself, and nothing secret goes through but the header
    of a restriction. ``tls`` is used instead where it is given.
    """
    try:
        # whether other machines may reach it is for the start of the server to judge
        config = load_server_config({"insecure": True}, file=file).grpc
    except InvalidSettings as error:
        raise UsageError(str(error)) from error
    if not config.enabled:
        raise UsageError("the configuration has no gRPC door (grpc.enabled): ask GET /v2/health/ready of the REST door")
    if not config.port and not config.host.startswith("unix"):
        raise UsageError("grpc.port is 0 in the configuration, a free port: add --url HOST:PORT")
    url = config.write_address(config.port)
    for host, nearest in _EVERYWHERE.items():
        if config.host == host:
            url = f"{nearest}:{config.port}"
    if tls is None and config.tls.is_enabled:
        tls = _trust(config, url)
    restrictions = (each for each in config.restricted_protocols if Group.HEALTH in each.groups)
    headers: dict[str, str | bytes] = {
        f"triton-grpc-protocol-{each.key.lower()}": each.value.get_secret_value() for each in restrictions
    }
    return Door(url, tls, metadata=headers)


def _trust(config: GrpcConfig, url: str) -> TlsConfig:
    """TLS that takes the certificate which the server shows, whatever its name and authority."""
    try:
        shown = ssl.DER_cert_to_PEM_cert(_shake_hands(url, None)[0])
        names = _shake_hands(url, shown)[1]
    except OSError as error:
        raise CommandError(f"{url}: no TLS server answers: {error}", ExitCode.UNREACHABLE, "UNAVAILABLE") from None
    # to servers that want one: whoever has the server's own key is no stranger
    certificate, key = (config.tls.certificate, config.tls.key) if config.tls.require_client_auth else (None, None)
    return TlsConfig(shown.encode(), certificate, key, names)


def _shake_hands(url: str, trusted: str | None) -> tuple[bytes, str | None]:
    """The certificate of the server, and where it is ``trusted`` a name that it is for."""
    context = ssl.create_default_context(cadata=trusted)
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    if trusted is None:
        context.verify_mode = ssl.CERT_NONE
    else:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    with _connect(url) as raw, context.wrap_socket(raw) as connection:
        der = connection.getpeercert(binary_form=True)
        told: Any = connection.getpeercert() or {}
    subject = [pair for part in told.get("subject", ()) for pair in part]
    names = [value for _, value in told.get("subjectAltName", ())]
    names += [value for key, value in subject if key == "commonName"]
    return der or b"", names[0].replace("*", "any") if names else None


def _connect(url: str) -> socket.socket:
    if url.startswith("unix:"):
        raw = socket.socket(socket.AF_UNIX)
        raw.settimeout(CONNECT_S)
        raw.connect(url.removeprefix("unix:"))
        return raw
    host, _, port = url.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), CONNECT_S)
