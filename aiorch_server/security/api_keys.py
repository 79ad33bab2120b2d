"""Callers by API keys: ``aio_<id>_<secret>``, of which the server keeps the secret's SHA-256.

A plain digest is enough, because the secret has 256 random bits: there are no likely ones to try.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from aiorch_server.errors import NotAuthenticated
from aiorch_server.security.authenticator import Authenticator, AuthMethod, Credentials, Identity

PREFIX: Final = "aio_"
_FORM: Final = re.compile(r"aio_([A-Za-z0-9]{4,64})_([A-Za-z0-9_-]{43})", re.ASCII)
_REFUSED: Final = "the API key is unknown or revoked"


@dataclass(frozen=True, slots=True)
class KnownKey:
    """An API key that is not revoked; ``sha256`` is of its secret, ``expires_ns`` on the wall clock, 0 for never."""

    id: str
    sha256: bytes
    principal: str
    tenant: str = ""
    expires_ns: int = 0


class ApiKeys(Protocol):
    """Where API keys are known."""

    async def find_key(self, id: str) -> KnownKey | None:
        """The key of that id, None for an unknown or revoked one; CapacityError where nobody can say."""
        ...


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: ``text`` is what its owner sends, and is shown once."""

    id: str
    text: str
    sha256: bytes


def make_key() -> NewKey:
    """A key with 256 random bits."""
    id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    return NewKey(id, f"{PREFIX}{id}_{secret}", hash_secret(secret))


def hash_secret(secret: str) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode("ascii")).digest()


class ApiKeyAuthenticator(Authenticator):
    """Bearers that begin as API keys do; those of the settings are looked at before those of ``others``."""

    expects = "an API key"

    def __init__(self, fixed: Iterable[KnownKey] = (), others: ApiKeys | None = None) -> None:
        self._fixed = {key.id: key for key in fixed}
        self._others = others

    async def authenticate(self, credentials: Credentials) -> Identity | None:
        """Whose key it is; None for a bearer that is none."""
        bearer = credentials.bearer
        if bearer is None or not bearer.startswith(PREFIX):
            return None
        matched = _FORM.fullmatch(bearer)
        if matched is None:
            raise NotAuthenticated(_REFUSED)
        key = self._fixed.get(matched[1])
        if key is None and self._others is not None:
            key = await self._others.find_key(matched[1])
        # An unknown id takes as long as a wrong secret.
        is_right = hmac.compare_digest(hash_secret(matched[2]), key.sha256 if key is not None else bytes(32))
        if key is None or not is_right:
            raise NotAuthenticated(_REFUSED)
        return Identity(key.principal, AuthMethod.API_KEY, key.tenant, expires_ns=key.expires_ns)
