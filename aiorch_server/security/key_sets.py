"""The public keys of an issuer of tokens (JWK Set, RFC 7517), kept at hand while the issuer changes or is away."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from aiorch_server.errors import IdentityUnavailable

logger = logging.getLogger(__name__)

MAX_KEYS: Final = 100
MIN_RSA_BITS: Final = 2048
_RSA: Final = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
#: Signatures by kind of key. Secret keys (``oct``) are none: who knows them can sign.
_BY_KIND: Final[Mapping[tuple[str, str], tuple[Any, frozenset[str]]]] = {
    ("RSA", ""): (RSAAlgorithm, _RSA),
    ("EC", "P-256"): (ECAlgorithm, frozenset({"ES256"})),
    ("EC", "P-384"): (ECAlgorithm, frozenset({"ES384"})),
    ("EC", "P-521"): (ECAlgorithm, frozenset({"ES512"})),
    ("OKP", "Ed25519"): (OKPAlgorithm, frozenset({"EdDSA"})),
}


class VerificationKey(NamedTuple):
    """One public key and what may be verified with it; ``identity`` is equal for equal keys alone."""

    kid: str | None
    algorithms: frozenset[str]
    key: Any
    identity: str


def read_key_set(content: bytes) -> tuple[list[VerificationKey], list[str]]:
    """The usable keys of a JWK Set, and why others are not; ValueError for what is none. No text shows a key."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("it has no list 'keys'")
    if len(entries) > MAX_KEYS:
        raise ValueError(f"it has {len(entries)} keys, more than {MAX_KEYS}")
    keys, problems = [], []
    for index, entry in enumerate(entries):
        try:
            key = _read_key(entry)
        except ValueError as error:
            problems.append(f"keys[{index}] {error}")
        else:
            if key is not None:
                keys.append(key)
    return keys, problems


def _read_key(entry: Any) -> VerificationKey | None:
    """The key, None where it is for something else; ValueError where it cannot be used."""
    if not isinstance(entry, dict):
        raise ValueError("is no object")
    if entry.get("use", "sig") != "sig" or "verify" not in entry.get("key_ops", ["verify"]):
        return None
    kind = entry.get("kty")
    found = _BY_KIND.get((str(kind), "" if kind == "RSA" else str(entry.get("crv", ""))))
    if found is None:
        raise ValueError("is of a kind that is not taken; expected RSA, EC (P-256, P-384, P-521) or OKP (Ed25519)")
    if "d" in entry:
        raise ValueError("is a private key; whoever can read it can sign, so its signatures prove nothing")
    algorithm, signatures = found
    if "alg" in entry:
        signatures &= {entry["alg"]}
        if not signatures:
            raise ValueError("says an algorithm that is not taken with such a key")
    try:
        key = algorithm.from_jwk(entry)
    except Exception:  # whatever is wrong inside
        raise ValueError("cannot be read") from None
    if kind == "RSA" and key.key_size < MIN_RSA_BITS:
        raise ValueError(f"has {key.key_size} bits, fewer than {MIN_RSA_BITS}")
    kid = entry.get("kid")
    if kid is not None and not isinstance(kid, str):
        raise ValueError("has a kid that is no text")
    return VerificationKey(kid, signatures, key, json.dumps(entry, sort_keys=True))


class KeySet:
    """Keys that ``fetch`` gets (the bytes of a JWK Set; on a thread, bounded by itself); on one event loop.

    ``what`` names it in texts. While ``fetch`` fails, the keys that were there before stay in force.
    """

    def __init__(
        self,
        fetch: Callable[[], bytes],
        *,
        what: str,
        refresh_s: float,
        refresh_min_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._what = what
        self._refresh_s = refresh_s
        self._refresh_min_s = refresh_min_s
        self._clock = clock
        self._keys: list[VerificationKey] = []
        self._asked_at: float | None = None
        self._is_known = False
        self._has_failed = False
        self._has_lost_keys = False
        self._fetching: asyncio.Task[None] | None = None
        self.fetches = 0

    async def find(self, kid: str | None, algorithm: str) -> list[VerificationKey]:
        """The keys that a token with this header may be signed with; for an unknown ``kid`` they are fetched again.

        That happens at most once in ``refresh_min_s``, whoever asks. IdentityUnavailable where they cannot be had, so
        that nobody knows whether there is such a key.
        """
        found = self._select(kid, algorithm)
        if not found:
            if self._fetching is not None or self._is_older_than(self._refresh_min_s):
                await asyncio.shield(self._begin())
            found = self._select(kid, algorithm)
        if not found and (self._has_failed or not self._is_known):
            raise IdentityUnavailable(f"the keys of {self._what} cannot be had, so tokens cannot be checked")
        return found

    async def look(self) -> bool:
        """Begins to fetch the keys where that is due; True once after keys have been taken away."""
        if self._fetching is None and self._is_older_than(self._refresh_min_s if self._has_failed else self._refresh_s):
            self._begin()
        lost, self._has_lost_keys = self._has_lost_keys, False
        return lost

    async def close(self) -> None:
        """Ends a fetch under way."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)

    def _select(self, kid: str | None, algorithm: str) -> list[VerificationKey]:
        return [each for each in self._keys if algorithm in each.algorithms and kid in (None, each.kid)]

    def _is_older_than(self, age_s: float) -> bool:
        return self._asked_at is None or self._clock() - self._asked_at >= age_s

    def _begin(self) -> asyncio.Task[None]:
        if self._fetching is None:
            self._asked_at = self._clock()
            self.fetches += 1
            self._fetching = asyncio.create_task(self._refresh())
        return self._fetching

    async def _refresh(self) -> None:
        try:
            keys, problems = read_key_set(await asyncio.to_thread(self._fetch))
            if not keys:
                raise ValueError("it has no key that can be used")
        except Exception as error:  # the issuer's or the network's
            if not self._has_failed:
                kept = "the keys known before stay in force" if self._is_known else "tokens are refused until it can"
                reason = str(error) or type(error).__name__
                logger.warning("the key set of %s cannot be used, %s: %s", self._what, kept, reason)
            self._has_failed = True
        else:
            if self._has_failed:
                logger.info("the key set of %s can be used again", self._what)
            for problem in problems:
                logger.warning("the key set of %s: %s", self._what, problem)
            kept_keys = {each.identity for each in keys}
            self._has_lost_keys |= any(each.identity not in kept_keys for each in self._keys)
            self._keys, self._has_failed, self._is_known = keys, False, True
        finally:
            self._fetching = None


def decode_base64url(text: str) -> bytes:
    """Bytes from base64url without padding; ValueError."""
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
