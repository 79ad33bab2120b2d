"""``aiorch status --ready``: whether a server takes requests.

Without ``--url`` it is the one of this machine's configuration.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
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
_CERTIFICATE: Final = re.compile("-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)


@dataclass(frozen=True)
class Door:
    """Where a server is asked, how, and with which headers."""

    url: str
    tls: TlsConfig | None = None
    token: str | None = None
    metadata: Sequence[tuple[str, str]] = ()


def check_ready(output: ClientOutput, door: Door, timeout_s: float) -> None:
    """Says that the server is ready; CommandError with the reason where it is not, UnreachableError."""
    with open_client(
        door.url, timeout_s=timeout_s, tls=door.tls, token=door.token, metadata=door.metadata
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


def find_door(
    file: Path | None, tls: TlsConfig | None, token: str | None = None, headers: Sequence[tuple[str, str]] = ()
) -> Door:
    """The gRPC door of the server that ``aiorch serve`` starts with this file and environment; UsageError.

    Asked with the ``token`` and the ``headers`` that were given, and with that of a restriction. Without ``tls`` the
    server must show the certificate of the configuration: one that shows another is asked only with nothing secret.
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
    restrictions = (each for each in config.restricted_protocols if Group.HEALTH in each.groups)
    metadata = {f"triton-grpc-protocol-{each.key.lower()}": each.value.get_secret_value() for each in restrictions}
    metadata.update(headers)
    if tls is None and config.tls.is_enabled:
        tls = _trust(config, url, has_secrets=token is not None or bool(metadata))
    return Door(url, tls, token, tuple(metadata.items()))


def _trust(config: GrpcConfig, url: str, *, has_secrets: bool) -> TlsConfig:
    """TLS that takes the certificate which the server shows, whatever its name and authority, and no other.

    CommandError where that is not the configuration's own, and what is sent ``has_secrets``.
    """
    try:
        der = _shake_hands(url, None)[0]
        shown = ssl.DER_cert_to_PEM_cert(der)
        names = _shake_hands(url, shown)[1]
        # one that was replaced lately is shown for some time yet
        if has_secrets and der != _read_certificate(config.tls.certificate):
            raise CommandError(
                f"{url} shows another certificate than that of grpc.tls.certificate, {config.tls.certificate}: neither "
                "a token nor a header was sent to it; name the authority to trust with --tls-root-cert",
                ExitCode.REFUSED,
                "UNAUTHENTICATED",
            )
    except OSError as error:
        raise CommandError(f"{url}: no TLS server answers: {error}", ExitCode.UNREACHABLE, "UNAVAILABLE") from None
    # to servers that want one: whoever has the server's own key is no stranger
    certificate, key = (config.tls.certificate, config.tls.key) if config.tls.require_client_auth else (None, None)
    return TlsConfig(shown.encode(), certificate, key, names)


def _read_certificate(path: Path | None) -> bytes:
    """A server's own certificate, the first in its file."""
    found = _CERTIFICATE.search("" if path is None else path.read_text(errors="replace"))
    return ssl.PEM_cert_to_DER_cert(found[0]) if found is not None else b""


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
