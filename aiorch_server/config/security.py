"""The section that says who may call: identities, roles, and whether a door may be open to everybody."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, FilePath, model_validator

from aiorch_server.config.problems import Problem, raise_problems
from aiorch_server.config.section import Flag, Number, Section, Whole

_NAME = re.compile(r"[!-~]([ -~]{0,254}[!-~])?", re.ASCII)
_KEY_ID = re.compile(r"[A-Za-z0-9]{4,64}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PATTERN = re.compile(r"[^\0/]{1,255}")
_LOOPBACKS = frozenset({"127.0.0.1", "::1", "localhost"})
_PLUGIN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*|[A-Za-z_][\w-]*", re.ASCII)


def _make_check(pattern: re.Pattern[str], expected: str) -> AfterValidator:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(f"should be {expected}")
        return text

    return AfterValidator(check)


def _check_principal(text: str) -> str:
    if text.removeprefix("group:") == "":
        raise ValueError("should be a name, or group:NAME")
    return text


def _check_url(text: str) -> str:
    parts = urlsplit(text)
    is_local = parts.scheme == "http" and parts.hostname in _LOOPBACKS
    if not parts.hostname or (parts.scheme != "https" and not is_local) or parts.username or parts.fragment:
        raise ValueError("should be an https:// address (http:// only on this machine) without user and fragment")
    return text


def _check_rate(per_s: float) -> float:
    if 0 < per_s < 0.001:
        raise ValueError("should be 0 (no bound), or 0.001 to 100000000")
    return per_s


def _read_role(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Name = Annotated[str, _make_check(_NAME, "1 to 256 printable ASCII characters")]
Principal = Annotated[Name, AfterValidator(_check_principal)]
Models = Annotated[str, _make_check(_PATTERN, "a model's name, with * for any characters")]
Url = Annotated[str, Field(max_length=2000), AfterValidator(_check_url)]
Claim = Annotated[str, Field(min_length=1, max_length=200)]
Rate = Annotated[Number, Field(ge=0, le=1e8), AfterValidator(_check_rate)]
Prefix = Annotated[str, Field(max_length=100, pattern=r"^[!-~]*$")]


class RoleName(enum.StrEnum):
    """From least to most; see security.roles."""

    VIEWER = "viewer"
    CLIENT = "client"
    DEPLOYER = "deployer"
    ADMIN = "admin"


class Algorithm(enum.StrEnum):
    """Signatures of tokens that can be accepted; there is none that is made with a secret which the server knows."""

    RS256 = "RS256"
    RS384 = "RS384"
    RS512 = "RS512"
    PS256 = "PS256"
    PS384 = "PS384"
    PS512 = "PS512"
    ES256 = "ES256"
    ES384 = "ES384"
    ES512 = "ES512"
    EDDSA = "EdDSA"


class CertificateName(enum.StrEnum):
    """Where a client certificate's name is looked for."""

    URI = "uri"
    DNS = "dns"
    EMAIL = "email"
    COMMON_NAME = "common-name"


class BindingConfig(Section):
    """A role for a caller, or for a group (``group:NAME``), on the models whose names fit ``models``."""

    principal: Principal
    role: Annotated[RoleName, BeforeValidator(_read_role)]
    models: Models = "*"


class CertificatesConfig(Section):
    """Names from client certificates: of ``names`` (empty: uri, dns, common-name) the first that the certificate has.

    ``uri_prefix`` is what such an alternative name must begin with, ``spiffe://example.org/`` for one trust domain;
    the name is what stands in the certificate, behind ``prefix``.
    """

    enabled: Flag = True
    names: tuple[CertificateName, ...] = ()
    uri_prefix: Annotated[str, Field(max_length=500)] = ""
    prefix: Prefix = ""


class TokensConfig(Section):
    """JSON Web Tokens of one issuer.

    The keys are read from ``jwks_file``, ``jwks_url``, or the address that ``issuer``'s own description names. They are
    fetched again every ``refresh_secs``, and at once for an unknown key, but not more often than every
    ``refresh_min_secs``. ``leeway_secs`` is what the clocks may differ. Names of claims may have dots where claims lie
    in objects; of ``roles_claim`` each word is ``ROLE`` or ``ROLE:MODELS``, and others are passed over.
    """

    issuer: Annotated[str, Field(min_length=1, max_length=2000)]
    audience: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=2000)], ...], Field(min_length=1)]
    jwks_file: FilePath | None = None
    jwks_url: Url | None = None
    tls_root: FilePath | None = None
    algorithms: Annotated[tuple[Algorithm, ...], Field(min_length=1)] = (
        Algorithm.RS256,
        Algorithm.PS256,
        Algorithm.ES256,
        Algorithm.EDDSA,
    )
    leeway_secs: Annotated[Number, Field(ge=0, le=300)] = 30.0
    refresh_secs: Annotated[Number, Field(ge=1, le=24 * 3600)] = 300.0
    refresh_min_secs: Annotated[Number, Field(ge=1, le=3600)] = 10.0
    timeout_secs: Annotated[Number, Field(gt=0, le=30)] = 5.0
    name_claim: Claim = "sub"
    groups_claim: Claim = "groups"
    tenant_claim: Claim = "tenant"
    roles_claim: Claim = "aiorch_roles"
    prefix: Prefix = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(self._find_problems())
        return self

    def _find_problems(self) -> Iterator[Problem]:
        if self.jwks_file is not None and self.jwks_url is not None:
            yield Problem(("jwks_url",), "is given beside jwks_file; keys come from one place")
        if self.jwks_file is None and self.jwks_url is None:
            try:
                _check_url(self.issuer)
            except ValueError as error:
                yield Problem(("issuer",), f"found {self.issuer!r}; it {error}, or jwks_file or jwks_url be given")


class ApiKeyConfig(Section):
    """A key that is known without a registry: ``aio_<id>_<secret>``, of which ``sha256`` is the secret's digest."""

    id: Annotated[str, _make_check(_KEY_ID, "4 to 64 letters and digits")]
    sha256: Annotated[str, _make_check(_SHA256, "the 64 hexadecimal digits of the secret's SHA-256")]
    principal: Principal
    tenant: Annotated[str, Field(max_length=256)] = ""
    expires_at: datetime | None = None


class QuotaConfig(Section):
    """What a tenant may take, on each server and over all doors together; 0: no bound. ``*``: each other tenant.

    ``weight`` is that of its share of a queue from which somebody must be refused.
    """

    tenant: Annotated[str, Field(min_length=1, max_length=128)]
    requests_per_s: Rate = 0.0
    rows_per_s: Rate = 0.0
    max_in_flight: Annotated[Whole, Field(ge=0, le=2**31 - 1)] = 0
    weight: Annotated[Number, Field(ge=0.001, le=1000)] = 1.0


class SecurityConfig(Section):
    """Who may call. Off, everybody who reaches a port may do what it offers.

    On, each call needs credentials: a client certificate (a door with ``tls.require_client_auth``), a token of one of
    the issuers in ``tokens``, or an API key. ``bindings`` say what each may do, ``quotas`` how much. ``authenticators``
    are further ones, ``module:attribute`` or the name of an installed one. ``insecure`` lets a door without TLS or
    without credentials listen on an address that other machines reach.
    """

    enabled: Flag = False
    insecure: Flag = False
    certificates: CertificatesConfig = CertificatesConfig()
    tokens: Annotated[tuple[TokensConfig, ...], Field(max_length=16)] = ()
    api_keys: Annotated[tuple[ApiKeyConfig, ...], Field(max_length=10_000)] = ()
    authenticators: tuple[Annotated[str, _make_check(_PLUGIN, "module:attribute, or a name")], ...] = ()
    bindings: Annotated[tuple[BindingConfig, ...], Field(max_length=10_000)] = ()
    quotas: Annotated[tuple[QuotaConfig, ...], Field(max_length=10_000)] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(self._find_problems())
        return self

    def _find_problems(self) -> Iterator[Problem]:
        for name in ("tokens", "api_keys", "authenticators", "bindings", "quotas"):
            if not self.enabled and getattr(self, name):
                yield Problem((name,), "has no use without security.enabled: true")
        seen: set[str] = set()
        for index, key in enumerate(self.api_keys):
            if key.id in seen:
                yield Problem(("api_keys", index, "id"), f"found {key.id!r} again; ids must differ")
            seen.add(key.id)
        yield from self._find_confusions()

    def _find_confusions(self) -> Iterator[Problem]:
        """Somebody at one issuer must not be taken for somebody of the same name elsewhere."""
        issuers: set[str] = set()
        prefixes = {self.certificates.prefix: "certificates"} if self.certificates.enabled else {}
        for index, each in enumerate(self.tokens):
            if each.issuer in issuers:
                yield Problem(("tokens", index, "issuer"), f"found {each.issuer!r} again; issuers must differ")
            issuers.add(each.issuer)
            if each.prefix in prefixes:
                text = (
                    f"found {each.prefix!r}, as {prefixes[each.prefix]} has; give each source of names a prefix of its "
                    "own, such as corp: for corp:alice, or set security.certificates.enabled: false"
                )
                yield Problem(("tokens", index, "prefix"), text)
            prefixes[each.prefix] = f"tokens[{index}]"
