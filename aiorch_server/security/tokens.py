"""Callers by JSON Web Tokens (RFC 7519), as RFC 8725 and RFC 9068 want them to be looked at."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import jwt

from aiorch_server.config.security import TokensConfig
from aiorch_server.errors import NotAuthenticated
from aiorch_server.security.authenticator import Authenticator, AuthMethod, Credentials, Identity
from aiorch_server.security.identity import RoleBinding
from aiorch_server.security.key_sets import KeySet, decode_base64url
from aiorch_server.security.key_sources import make_discovery, make_fetch, read_file
from aiorch_server.security.roles import Role

#: Keys that are tried for a token which does not say the name of its key.
_MOST_TRIED: Final = 8
_LAST_S: Final = 2**32
_REASONS: Final = (
    (jwt.ExpiredSignatureError, "has expired"),
    (jwt.ImmatureSignatureError, "is not valid yet"),
    (jwt.InvalidAudienceError, "is for another audience"),
    (jwt.MissingRequiredClaimError, "lacks a claim that is needed (exp, aud, iss)"),
    (jwt.InvalidIssuerError, "is of another issuer"),
    (jwt.InvalidSignatureError, "has a signature that does not hold"),
)


class TokenAuthenticator(Authenticator):
    """Bearer tokens of one issuer.

    A token that is bound to a client certificate (``cnf`` with ``x5t#S256``, RFC 8705) holds on connections with that
    certificate alone; one that is bound to something else is refused, since that cannot be checked.
    """

    def __init__(self, config: TokensConfig, keys: KeySet | None = None) -> None:
        self._config = config
        self._algorithms = frozenset(each.value for each in config.algorithms)
        self._keys = keys or _make_keys(config)
        self._decoder = jwt.PyJWT()
        self.expects = f"a bearer token of {config.issuer}"

    async def authenticate(self, credentials: Credentials) -> Identity | None:
        """Whose token it is; None for a bearer that is no token of this issuer."""
        token = credentials.bearer
        if token is None or token.count(".") != 2:
            return None
        header, claims = _peek(token)
        if header is None or claims is None or claims.get("iss") != self._config.issuer:
            return None
        algorithm, kid = header.get("alg"), header.get("kid")
        if not isinstance(algorithm, str) or algorithm not in self._algorithms:
            raise _refuse("is signed with an algorithm that is not accepted, or not signed")
        if "crit" in header or "b64" in header or not (kid is None or isinstance(kid, str)):
            raise _refuse("has a header that cannot be honoured")
        keys = await self._keys.find(kid, algorithm)
        if not keys:
            raise _refuse("is signed with a key that its issuer does not have")
        verified = self._verify(token, algorithm, [each.key for each in keys[:_MOST_TRIED]])
        return self._identify(verified, _check_binding(verified, credentials.certificate))

    async def refresh(self) -> bool:
        """Whether the issuer has taken keys away."""
        return await self._keys.look()

    async def close(self) -> None:
        """Ends what is being fetched."""
        await self._keys.close()

    def _verify(self, token: str, algorithm: str, keys: Iterable[Any]) -> Mapping[str, Any]:
        failure: Exception = NotAuthenticated("")
        for key in keys:
            try:
                claims: Mapping[str, Any] = self._decoder.decode(
                    token,
                    key,
                    algorithms=[algorithm],
                    audience=self._config.audience,
                    issuer=self._config.issuer,
                    leeway=self._config.leeway_secs,
                    options={"require": ["exp", "iss", "aud"]},
                )
            except jwt.InvalidSignatureError as error:
                failure = error
            except Exception as error:  # a token may hold anything
                raise _refuse(_explain(error)) from None
            else:
                return claims
        raise _refuse(_explain(failure))

    def _identify(self, claims: Mapping[str, Any], is_bound: bool) -> Identity:
        config = self._config
        name = _find(claims, config.name_claim)
        if not isinstance(name, str) or not name:
            raise _refuse(f"has no claim '{config.name_claim}' with a name")
        tenant = _find(claims, config.tenant_claim)
        principal = config.prefix + name
        return Identity(
            name=principal,
            method=AuthMethod.TOKEN,
            tenant=config.prefix + tenant if isinstance(tenant, str) and tenant else "",
            groups=tuple(config.prefix + each for each in _list_words(_find(claims, config.groups_claim))),
            roles=tuple(_read_roles(principal, _list_words(_find(claims, config.roles_claim)))),
            expires_ns=int((min(int(claims["exp"]), _LAST_S) + config.leeway_secs) * 1e9),
            is_bound=is_bound,
        )


def _make_keys(config: TokensConfig) -> KeySet:
    timeout_s, root = config.timeout_secs, config.tls_root
    fetch: Callable[[], bytes]
    if config.jwks_file is not None:
        fetch = partial(read_file, config.jwks_file)
    elif config.jwks_url is not None:
        fetch = make_fetch(config.jwks_url, timeout_s=timeout_s, tls_root=root)
    else:
        fetch = make_discovery(config.issuer, timeout_s=timeout_s, tls_root=root)
    return KeySet(fetch, what=config.issuer, refresh_s=config.refresh_secs, refresh_min_s=config.refresh_min_secs)


def _peek(token: str) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Header and claims of a token that nobody has verified."""
    parts = []
    for part in token.split(".")[:2]:
        try:
            value = json.loads(decode_base64url(part))
        except (ValueError, RecursionError):
            value = None
        parts.append(value if isinstance(value, dict) else None)
    return parts[0], parts[1]


def _check_binding(claims: Mapping[str, Any], certificate: bytes) -> bool:
    """Whether the token is bound to the connection's certificate; refused where it is to anything else."""
    if "cnf" not in claims:
        return False
    confirmation = claims["cnf"]
    wanted = confirmation.get("x5t#S256") if isinstance(confirmation, dict) and len(confirmation) == 1 else None
    try:
        expected = decode_base64url(wanted) if isinstance(wanted, str) else b""
    except ValueError:
        expected = b""
    if not certificate or not hmac.compare_digest(expected, hashlib.sha256(certificate).digest()):
        raise _refuse("is bound to a key that this connection does not prove")
    return True


def _find(claims: Mapping[str, Any], path: str) -> Any:
    """The claim of that name; where there is none, what lies at the path that its dots make."""
    if path in claims:
        return claims[path]
    found: Any = claims
    for step in path.split("."):
        found = found.get(step) if isinstance(found, dict) else None
    return found


def _list_words(value: Any) -> list[str]:
    words = value.split() if isinstance(value, str) else value if isinstance(value, list) else []
    return [word for word in words if isinstance(word, str) and word]


def _read_roles(principal: str, words: Iterable[str]) -> Iterator[RoleBinding]:
    for word in words:
        name, colon, models = word.partition(":")
        if name.upper() in Role.__members__ and (models or not colon):
            yield RoleBinding(principal, Role[name.upper()], models or "*")


def _explain(error: Exception) -> str:
    return next((text for kind, text in _REASONS if isinstance(error, kind)), "is malformed")


def _refuse(text: str) -> NotAuthenticated:
    return NotAuthenticated(f"the bearer token {text}")
