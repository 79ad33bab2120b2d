"""Callers by the client certificates that their connections have proved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from aiorch_server.config.security import CertificateName, CertificatesConfig
from aiorch_server.errors import NotAuthenticated
from aiorch_server.security.authenticator import Authenticator, AuthMethod, Credentials, Identity

_DEFAULT: Final = (CertificateName.URI, CertificateName.DNS, CertificateName.COMMON_NAME)
_KINDS: Final[Mapping[CertificateName, Any]] = {
    CertificateName.URI: x509.UniformResourceIdentifier,
    CertificateName.DNS: x509.DNSName,
    CertificateName.EMAIL: x509.RFC822Name,
}


class CertificateAuthenticator(Authenticator):
    """The first name of those kinds that the settings ask for, of a certificate that the door has checked already.

    The organisation (O) of the subject is the tenant, each organisational unit (OU) a group.
    """

    expects = "a client certificate"

    def __init__(self, config: CertificatesConfig) -> None:
        self._config = config
        self._kinds = config.names or _DEFAULT

    async def authenticate(self, credentials: Credentials) -> Identity | None:
        """Whose certificate it is; None without one, and where the call says by a header who it is."""
        if not credentials.certificate or credentials.authorizations:
            return None
        try:
            certificate = x509.load_der_x509_certificate(credentials.certificate)
            name = next(self._list_names(certificate), None)
            organisations = _read_subject(certificate, NameOID.ORGANIZATION_NAME)
            units = _read_subject(certificate, NameOID.ORGANIZATIONAL_UNIT_NAME)
        except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
            raise NotAuthenticated("the client certificate cannot be read") from None
        if name is None:
            kinds = ", ".join(self._kinds)
            raise NotAuthenticated(f"the client certificate has no name of the kinds that are looked at ({kinds})")
        prefix = self._config.prefix
        return Identity(
            name=prefix + name,
            method=AuthMethod.CERTIFICATE,
            tenant=prefix + organisations[0] if organisations else "",
            groups=tuple(prefix + unit for unit in units),
            expires_ns=int(certificate.not_valid_after_utc.timestamp() * 1e9),
        )

    def _list_names(self, certificate: x509.Certificate) -> Iterator[str]:
        try:
            alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            alternatives = x509.SubjectAlternativeName([])
        for kind in self._kinds:
            if kind is CertificateName.COMMON_NAME:
                found = _read_subject(certificate, NameOID.COMMON_NAME)
            else:
                found = [str(value) for value in alternatives.get_values_for_type(_KINDS[kind])]
            if kind is CertificateName.URI:
                found = [value for value in found if value.startswith(self._config.uri_prefix)]
            yield from (value for value in found if value)


def _read_subject(certificate: x509.Certificate, oid: x509.ObjectIdentifier) -> list[str]:
    return [str(attribute.value) for attribute in certificate.subject.get_attributes_for_oid(oid)]
