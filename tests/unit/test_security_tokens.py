"""Which tokens hold: forged, expired, unsigned and confused ones do not."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from issuers import AUDIENCE, ISSUER, make_key_set, make_private, make_token, show_key

from aiorch_server.config.security import TokensConfig
from aiorch_server.errors import NotAuthenticated
from aiorch_server.security import Credentials, Identity, Role, RoleBinding
from aiorch_server.security.key_sets import KeySet
from aiorch_server.security.tokens import TokenAuthenticator

ALL = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
KEYS = make_key_set(
    show_key(make_private("RS256"), "one"),
    show_key(make_private("ES256"), "es256"),
    show_key(make_private("ES384"), "es384"),
    show_key(make_private("ES512"), "es512"),
    show_key(make_private("EdDSA"), "ed"),
    show_key(make_private("PS256", 1), "ps", alg="PS256"),
)


def encode(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def open_tokens(keys: bytes = KEYS, **config: Any) -> TokenAuthenticator:
    settings = TokensConfig(issuer=ISSUER, audience=[AUDIENCE], algorithms=ALL, **config)
    return TokenAuthenticator(settings, KeySet(lambda: keys, what=ISSUER, refresh_s=300, refresh_min_s=300))


def bearer(token: str, certificate: bytes = b"") -> Credentials:
    return Credentials((f"Bearer {token}".encode(),), certificate)


async def identify(token: str, certificate: bytes = b"", **config: Any) -> Identity:
    found = await open_tokens(**config).authenticate(bearer(token, certificate))
    assert found is not None
    return found


async def refuse(token: str, **config: Any) -> str:
    with pytest.raises(NotAuthenticated) as raised:
        await open_tokens(**config).authenticate(bearer(token))
    text = str(raised.value)
    assert not any(part in text for part in token.split(".") if part), "the credential is repeated"
    return text.removeprefix("the bearer token ")


@pytest.mark.parametrize(
    ("algorithm", "kid"),
    [
        *(("RS256", "one"), ("RS384", "one"), ("RS512", "one"), ("PS256", "one"), ("PS384", "one"), ("PS512", "one")),
        *(("ES256", "es256"), ("ES384", "es384"), ("ES512", "es512"), ("EdDSA", "ed")),
    ],
)
async def test_every_algorithm(algorithm: str, kid: str) -> None:
    key = make_private("RS256") if kid == "one" else make_private(algorithm)
    found = await identify(make_token(algorithm, key=key, kid=kid))
    assert (found.name, found.method.value) == ("alice", "token")
    assert abs(found.expires_ns / 1e9 - time.time() - 90) < 5, "expiry and leeway"


async def test_what_claims_say() -> None:
    token = make_token(
        groups=["ml", "ops"], tenant="red", aiorch_roles="viewer deployer:team-a-* admin:  nonsense superuser:x"
    )
    found = await identify(token, prefix="corp:")
    assert (found.name, found.groups, found.tenant) == ("corp:alice", ("corp:ml", "corp:ops"), "corp:red")
    assert found.roles == (
        RoleBinding("corp:alice", Role.VIEWER, "*"),
        RoleBinding("corp:alice", Role.DEPLOYER, "team-a-*"),
    )


async def test_claims_deeper_down() -> None:
    token = make_token(realm={"roles": ["client"]}, sub="1234", email="a@example.org")
    found = await identify(token, roles_claim="realm.roles", name_claim="email")
    assert (found.name, found.roles[0].role) == ("a@example.org", Role.CLIENT)
    dotted = make_token(**{"https://example.org/groups": ["x"]})
    assert (await identify(dotted, groups_claim="https://example.org/groups")).groups == ("x",)


@pytest.mark.parametrize(
    ("claims", "text"),
    [
        ({"exp": int(time.time()) - 31}, "has expired"),
        ({"exp": None}, "lacks a claim"),
        ({"exp": "soon"}, "is malformed"),
        ({"exp": float("inf")}, "is malformed"),
        ({"aud": "somebody-else"}, "is for another audience"),
        ({"aud": None}, "lacks a claim"),
        ({"aud": [["aiorch"]]}, "is for another audience"),
        ({"nbf": int(time.time()) + 7200}, "is not valid yet"),
        ({"iat": int(time.time()) + 7200}, "is not valid yet"),
        ({"sub": None}, "has no claim 'sub'"),
        ({"sub": ""}, "has no claim 'sub'"),
        ({"sub": 7}, "is malformed"),
        ({"cnf": {"jkt": "abc"}}, "is bound to a key"),
        ({"cnf": "abc"}, "is bound to a key"),
        ({"cnf": {"x5t#S256": "!"}}, "is bound to a key"),
    ],
)
async def test_wrong_claims(claims: dict[str, Any], text: str) -> None:
    assert (await refuse(make_token(**claims))).startswith(text)


async def test_clocks_may_differ_a_little() -> None:
    await identify(make_token(exp=int(time.time()) - 20, nbf=int(time.time()) - 20))
    assert (await refuse(make_token(exp=int(time.time()) - 2), leeway_secs=0)).startswith("has expired")


@pytest.mark.parametrize("exp", [10**400, 1e300, 2**70])
async def test_tokens_that_hold_for_ages(exp: float) -> None:
    found = await identify(make_token(exp=exp))
    assert time.time_ns() < found.expires_ns < 2**63


async def test_tokens_of_other_issuers_are_left_to_others() -> None:
    tokens = open_tokens()
    for other in (
        make_token(iss="https://other.example"),
        make_token(iss=None),
        "abc",
        "a.b.c",
        "aio_abcd_x",
        "a.b.c.d.e",
    ):
        assert await tokens.authenticate(bearer(other)) is None
    assert await tokens.authenticate(Credentials((b"Basic YWxpY2U6cHc=",))) is None


async def test_unsigned_tokens() -> None:
    claims = make_token().split(".")[1]
    for name in ("none", "None", "NONE", "nOnE", "", "HS256", None, 7):
        for signature in ("", "AAAA"):
            told = await refuse(f"{encode({'alg': name, 'kid': 'one'})}.{claims}.{signature}")
            assert told.startswith("is signed with an algorithm that is not accepted, or not signed")


async def test_the_public_key_is_no_secret() -> None:
    """The classic confusion: HMAC with the issuer's public key, in each form in which one could take it."""
    public = make_private("RS256").public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    for secret in (pem, der, KEYS, b""):
        for algorithm in ("HS256", "RS256"):
            begin = f"{encode({'alg': algorithm, 'kid': 'one', 'typ': 'JWT'})}.{make_token().split('.')[1]}"
            signature = hmac.new(secret, begin.encode(), hashlib.sha256).digest()
            assert await refuse(f"{begin}.{encode(signature)}")


async def test_forged_signatures() -> None:
    header, claims, signature = make_token().split(".")
    later = encode({**json.loads(base64.urlsafe_b64decode(claims + "==")), "sub": "admin"})
    assert (await refuse(f"{header}.{later}.{signature}")).startswith("has a signature that does not hold")
    assert (await refuse(make_token(key=make_private("RS256", 9)))).startswith("has a signature that does not hold")
    flipped = base64.urlsafe_b64decode(signature + "==")
    assert await refuse(f"{header}.{claims}.{encode(flipped[:-1] + bytes([flipped[-1] ^ 1]))}")
    assert await refuse(f"{header}.{claims}.")
    # ES256 with r = s = 0, which careless code has taken
    zeros = f"{encode({'alg': 'ES256', 'kid': 'es256'})}.{claims}.{encode(bytes(64))}"
    assert (await refuse(zeros)).startswith("has a signature that does not hold")


async def test_a_key_signs_as_it_may_alone() -> None:
    """A key says which algorithm it is for, a curve has one, and keys of one kind are none of the other."""
    ps = make_private("PS256", 1)
    assert (await identify(make_token("PS256", key=ps, kid="ps"))).name == "alice"
    assert (await refuse(make_token("RS256", key=ps, kid="ps"))).startswith("is signed with a key that its issuer")
    assert (await refuse(make_token("ES256", key=make_private("ES256"), kid="one"))).startswith("is signed with a key")
    assert (await refuse(make_token("RS256", kid="es256"))).startswith("is signed with a key")


async def test_algorithms_that_are_not_wanted() -> None:
    only = open_tokens()
    only._algorithms = frozenset({"ES256"})
    with pytest.raises(NotAuthenticated, match="not accepted"):
        await only.authenticate(bearer(make_token()))


@pytest.mark.parametrize("more", [{"crit": ["exp"]}, {"crit": []}, {"b64": False}, {"kid": 7}, {"kid": ["one"]}])
async def test_headers_that_cannot_be_honoured(more: dict[str, Any]) -> None:
    header = encode({"alg": "RS256", "kid": "one", **more})
    claims = make_token().split(".")[1]
    begin = f"{header}.{claims}"
    signature = jwt.algorithms.RSAAlgorithm(jwt.algorithms.RSAAlgorithm.SHA256).sign(
        begin.encode(), make_private("RS256")
    )
    assert (await refuse(f"{begin}.{encode(signature)}")).startswith("has a header that cannot be honoured")


@pytest.mark.parametrize("more", [{"jwk": {}}, {"jku": "https://evil.example/keys"}, {"x5u": "https://evil.example"}])
async def test_keys_that_a_token_brings_are_not_looked_at(more: dict[str, Any]) -> None:
    own = make_private("RS256", 5)
    if "jwk" in more:
        more = {"jwk": show_key(own, "one")}
    assert (await refuse(make_token(key=own, header=more))).startswith("has a signature that does not hold")


async def test_a_token_without_the_name_of_its_key() -> None:
    assert (await identify(make_token(kid=None))).name == "alice"
    assert (await refuse(make_token(kid=None, key=make_private("RS256", 6)))).startswith("has a signature")
    assert (await refuse(make_token(kid="other"))).startswith("is signed with a key that its issuer does not have")


async def test_tokens_that_are_bound_to_certificates() -> None:
    certificate = b"a certificate"
    digest = encode(hashlib.sha256(certificate).digest())
    token = make_token(cnf={"x5t#S256": digest})
    found = await identify(token, certificate)
    assert found.is_bound and found.name == "alice"
    for other in (b"", b"another certificate"):
        with pytest.raises(NotAuthenticated, match="is bound to a key that this connection does not prove"):
            await open_tokens().authenticate(bearer(token, other))


async def test_depth_and_size() -> None:
    """What is odd is refused in no time, not followed."""
    claims = make_token().split(".")[1]
    deep = encode(b"[" * 4000)
    for token in (f"{deep}.{claims}.AAAA", f"{encode({'alg': 'RS256'})}.{deep}.AAAA", "." * 2, "é.é.é"):
        assert await open_tokens().authenticate(Credentials((f"Bearer {token}".encode(),))) is None
