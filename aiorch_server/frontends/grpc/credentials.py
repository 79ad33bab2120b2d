"""TLS for the native door: credentials that it can read, and the identity of a peer."""

from __future__ import annotations

import contextlib
import ssl
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AuthContext = Mapping[str, list[bytes]]

_INSECURE: AuthContext = {"transport_security_type": [b"insecure"], "security_level": [b"TSI_SECURITY_NONE"]}


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

    def make_ssl_context(self) -> ssl.SSLContext:
        """A server context that offers HTTP/2 alone; raises ValueError when key or certificates are not usable."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        try:
            with _write_private_file(self.certificate_chain + b"\n" + self.private_key) as path:
                context.load_cert_chain(path)
            if self.root_certificates is not None:
                context.load_verify_locations(cadata=self.root_certificates.decode("ascii"))
        except (ssl.SSLError, UnicodeDecodeError) as error:
            raise ValueError(f"the private key or the certificates are not usable PEM: {error}") from error
        if self.require_client_auth:
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@contextlib.contextmanager
def _write_private_file(content: bytes) -> Iterator[Path]:
    """A file that only this user can read, for the time of the block: the ssl module loads keys from files only."""
    with tempfile.TemporaryDirectory(prefix="aiorch-") as folder:
        path = Path(folder) / "pem"
        path.touch(mode=0o600)
        path.write_bytes(content)
        yield path


def describe_peer(ssl_object: ssl.SSLObject | None) -> AuthContext:
    """The auth context of a connection, with gRPC's property names; see ``ServicerContext.auth_context``."""
    if ssl_object is None:
        return _INSECURE
    properties: dict[str, list[bytes]] = {
        "transport_security_type": [b"ssl"],
        "security_level": [b"TSI_PRIVACY_AND_INTEGRITY"],
        "ssl_session_reused": [b"true" if ssl_object.session_reused else b"false"],
    }
    der = ssl_object.getpeercert(binary_form=True)
    if der is None:
        return properties
    properties["x509_pem_cert"] = [ssl.DER_cert_to_PEM_cert(der).encode()]
    certificate = ssl_object.getpeercert() or {}
    subject: Any = certificate.get("subject", ())  # typed too loosely to be of use
    common_names = [value.encode() for names in subject for name, value in names if name == "commonName"]
    if common_names:
        properties["x509_common_name"] = common_names
    alternatives = [str(pair[1]).encode() for pair in certificate.get("subjectAltName", ())]
    if alternatives:
        properties["x509_subject_alternative_name"] = alternatives
    return properties


def find_identity_key(auth_context: AuthContext) -> str | None:
    """The property that identifies the peer, or None where the peer is not authenticated."""
    for key in ("x509_subject_alternative_name", "x509_common_name"):
        if key in auth_context:
            return key
    return None
