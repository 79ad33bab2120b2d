"""TLS for the native door: credentials that it can read, and the identity of a peer."""

from __future__ import annotations

import contextlib
import ssl
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiorch_server import _core

if TYPE_CHECKING:
    from aiorch_server._core import Call, TlsContext

AuthContext = Mapping[str, list[bytes]]

#: Alternative names as Python's ssl module and as gRPC's properties call them.
_KINDS: Mapping[str, str] = {"DNS": "dns", "IP Address": "ip", "email": "email", "URI": "uri"}
_INSECURE: AuthContext = {"transport_security_type": [b"insecure"], "security_level": [b"TSI_SECURITY_NONE"]}


def is_tls_compiled() -> bool:
    """Whether the I/O threads have TLS; otherwise the loop carries it."""
    return _core.TlsContext is not None


@dataclass(frozen=True, slots=True)
class ServerCredentials:
    """What a secure port needs, all PEM: the server's key and certificate chain; the authorities of its clients.

    ``grpc.ssl_server_credentials`` gives objects that hide their content, so both doors take this class instead.
    With ``require_client_auth`` a client without a certificate signed by ``root_certificates`` is refused.
    """

    private_key: bytes = field(repr=False)
    certificate_chain: bytes
    root_certificates: bytes | None = None
    require_client_auth: bool = False

    def __post_init__(self) -> None:
        if self.require_client_auth and self.root_certificates is None:
            raise ValueError("require_client_auth needs root_certificates to check clients against")

    def make_tls_context(self) -> TlsContext:
        """For the I/O threads; raises ValueError when key or certificates are not usable."""
        return _core.TlsContext(
            self.private_key, self.certificate_chain, self.root_certificates, self.require_client_auth
        )

    def make_ssl_context(self, protocol: str = "h2") -> ssl.SSLContext:
        """For the loop: offers this protocol alone; raises ValueError when key or certificates are not usable."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols([protocol])
        try:
            with _write_private_file(self.certificate_chain + b"\n" + self.private_key) as path:
                context.load_cert_chain(path, password="")  # or OpenSSL asks for one, at whatever terminal there is
            if self.root_certificates is not None:
                context.load_verify_locations(cadata=self.root_certificates.decode("ascii"))
        except (ssl.SSLError, UnicodeDecodeError) as error:
            raise ValueError(f"the private key or the certificates are not usable PEM: {error}") from error
        if self.require_client_auth:
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def renew_ssl_context(context: ssl.SSLContext, renewed: ssl.SSLContext) -> None:
    """Handshakes with ``context`` from now on go on with ``renewed``, roots included; on the loop's thread.

    Tickets would bring sessions back that ``context`` opened, so there are none any more.
    """

    def switch(ssl_object: ssl.SSLObject, name: str | None, original: ssl.SSLContext) -> None:
        ssl_object.context = renewed

    context.sni_callback = switch  # called for every client, also without a name
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0


@contextlib.contextmanager
def _write_private_file(content: bytes) -> Iterator[Path]:
    """A file that only this user can read, for the time of the block: the ssl module loads keys from files only."""
    with tempfile.TemporaryDirectory(prefix="aiorch-") as folder:
        path = Path(folder) / "pem"
        path.touch(mode=0o600)
        path.write_bytes(content)
        yield path


def describe_peer(call: Call) -> AuthContext:
    """The auth context of a call's connection, with gRPC's property names; see ``ServicerContext.auth_context``."""
    ssl_object: ssl.SSLObject | None = call.get_extra_info("ssl_object")
    peer: tuple[bytes | None, bool] | None = call.get_extra_info("tls_peer")
    if ssl_object is not None:
        peer = ssl_object.getpeercert(binary_form=True), bool(ssl_object.session_reused)
    if peer is None:
        return _INSECURE
    der, is_resumed = peer
    properties: dict[str, list[bytes]] = {
        "transport_security_type": [b"ssl"],
        "security_level": [b"TSI_PRIVACY_AND_INTEGRITY"],
        "ssl_session_reused": [b"true" if is_resumed else b"false"],
    }
    if der is None:
        return properties
    properties["x509_pem_cert"] = [ssl.DER_cert_to_PEM_cert(der).encode()]
    common_name, alternatives = _read_names(der, ssl_object)
    if common_name is not None:
        properties["x509_common_name"] = [common_name]
    for kind, name in alternatives:
        properties.setdefault("x509_subject_alternative_name", []).append(name)
        properties.setdefault(f"peer_{kind}", []).append(name)
    return properties


def _read_names(der: bytes, ssl_object: ssl.SSLObject | None) -> tuple[bytes | None, list[tuple[str, bytes]]]:
    """Of a client's certificate the first common name, and the alternative names with their kinds."""
    if ssl_object is None or is_tls_compiled():
        return _core.read_names(der)
    certificate: Any = ssl_object.getpeercert() or {}  # typed too loosely to be of use
    subject = certificate.get("subject", ())
    common_names = [value.encode() for names in subject for name, value in names if name == "commonName"]
    alternatives = [
        (_KINDS[kind], str(value).encode()) for kind, value in certificate.get("subjectAltName", ()) if kind in _KINDS
    ]
    return (common_names[0] if common_names else None), alternatives


def find_peer_certificate(call: Call) -> bytes | None:
    """The certificate of a call's client in DER, None where it has shown none or there is no TLS."""
    ssl_object: ssl.SSLObject | None = call.get_extra_info("ssl_object")
    if ssl_object is not None:
        return ssl_object.getpeercert(binary_form=True)
    peer: tuple[bytes | None, bool] | None = call.get_extra_info("tls_peer")
    return None if peer is None else peer[0]


def find_identity_key(auth_context: AuthContext) -> str | None:
    """The property that identifies the peer, or None where the peer is not authenticated."""
    for key in ("x509_subject_alternative_name", "x509_common_name"):
        if key in auth_context:
            return key
    return None
