"""Keys, tokens, key sets and certificates of issuers that tests make themselves."""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

AUDIENCE = "aiorch"
ISSUER = "https://issuer.example"


@lru_cache
def make_private(algorithm: str, index: int = 0, bits: int = 2048) -> Any:
    """A private key for signatures of this algorithm; the same arguments give the same one."""
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    if algorithm.startswith("ES"):
        curves = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
        return ec.generate_private_key(curves[algorithm])
    return rsa.generate_private_key(65537, bits)


def show_key(private: Any, kid: str | None, *, is_private: bool = False, **more: Any) -> dict[str, Any]:
    """As an entry of a JWK Set."""
    kinds = ((rsa.RSAPrivateKey, RSAAlgorithm), (ec.EllipticCurvePrivateKey, ECAlgorithm))
    writer: Any = next((kind for known, kind in kinds if isinstance(private, known)), OKPAlgorithm)
    entry = writer.to_jwk(private if is_private else private.public_key(), as_dict=True)
    entry.pop("key_ops", None)
    return {**entry, **({"kid": kid} if kid is not None else {}), **more}


def make_key_set(*entries: Mapping[str, Any]) -> bytes:
    return json.dumps({"keys": entries}).encode()


def make_token(
    algorithm: str = "RS256", *, key: Any = None, kid: str | None = "one", header: Any = None, **claims: Any
) -> str:
    """A token that is right but for what the arguments say; a claim of None is left out."""
    now = int(time.time())
    all_claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now, "exp": now + 60, **claims}
    return jwt.encode(
        {name: value for name, value in all_claims.items() if value is not None},
        key if key is not None else make_private(algorithm),
        algorithm,
        headers={**({"kid": kid} if kid is not None else {}), **(header or {})},
    )


class _Site(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.pages: dict[str, tuple[int, bytes, dict[str, str]]] = {}
        self.asked: list[str] = []
        self.before_answer: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, path: str, body: bytes, status: int = 200, **headers: str) -> None:
        self.pages[path] = (status, body, headers)

    def put_issuer(self, *entries: Mapping[str, Any]) -> None:
        """The pages of an issuer at this address, with these keys."""
        description = {"issuer": self.url, "jwks_uri": f"{self.url}/keys"}
        self.put("/.well-known/openid-configuration", json.dumps(description).encode())
        self.put("/keys", make_key_set(*entries))


class _Answers(BaseHTTPRequestHandler):
    server: _Site

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.before_answer is not None:
            self.server.before_answer()
        status, body, headers = self.server.pages.get(self.path, (404, b"", {}))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # who asked has had enough
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serve_pages() -> Iterator[_Site]:
    """An HTTP server with pages that the test puts there."""
    with _Site() as site:
        thread = threading.Thread(target=site.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield site
        finally:
            site.shutdown()
            thread.join()


class Authority:
    """An authority that signs certificates; all as PEM files in ``folder``."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._name = subject
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        certificate = self._begin(subject, self._key).add_extension(constraints, critical=True)
        self.pem = self._write(name, certificate.sign(self._key, hashes.SHA256()), self._key)

    def issue(
        self, name: str, *alternatives: x509.GeneralName, units: tuple[str, ...] = (), organisation: str = ""
    ) -> Path:
        """A certificate of that common name; its key lies beside it with suffix .key."""
        key = ec.generate_private_key(ec.SECP256R1())
        parts = [(NameOID.COMMON_NAME, name), *((NameOID.ORGANIZATIONAL_UNIT_NAME, unit) for unit in units)]
        parts += [(NameOID.ORGANIZATION_NAME, organisation)] if organisation else []
        subject = x509.Name([x509.NameAttribute(*part) for part in parts])
        certificate = self._begin(subject, key)
        if alternatives:
            certificate = certificate.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = certificate.add_extension(authority, critical=False)
        return self._write(name.replace("/", "_"), certificate.sign(self._key, hashes.SHA256()), key)

    def _begin(self, subject: x509.Name, key: Any) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )

    def _write(self, name: str, certificate: x509.Certificate, key: Any) -> Path:
        path = self.folder / f"{name}.pem"
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        forms = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        path.with_suffix(".key").write_bytes(key.private_bytes(*forms))
        return path
