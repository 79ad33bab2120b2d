"""Key sets: what is taken from them, when they are fetched, and what holds while they cannot be."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from issuers import make_key_set, make_private, serve_pages, show_key

from aiorch_server.errors import IdentityUnavailable
from aiorch_server.security.key_sets import KeySet, read_key_set
from aiorch_server.security.key_sources import MAX_BYTES, make_discovery, make_fetch, read_file

ONE, TWO = (make_private("RS256", index) for index in (0, 1))


class Issuer:
    """Counts what is asked, and gives what the test wants."""

    def __init__(self, *entries: Any) -> None:
        self.entries = list(entries)
        self.now = 100.0
        self.is_away = False
        self.asked = 0
        self.gate: threading.Event | None = None

    def fetch(self) -> bytes:
        self.asked += 1
        if self.gate is not None:
            self.gate.wait(10)
        if self.is_away:
            raise OSError("nobody there")
        return make_key_set(*self.entries)

    def open(self) -> KeySet:
        return KeySet(self.fetch, what="the issuer", refresh_s=300, refresh_min_s=10, clock=lambda: self.now)


async def find(keys: KeySet, kid: str | None) -> list[str | None]:
    return [each.kid for each in await keys.find(kid, "RS256")]


async def settle(keys: KeySet) -> None:
    while keys._fetching is not None:
        await asyncio.sleep(0.001)


async def test_an_unknown_key_is_asked_for_at_most_every_so_often() -> None:
    issuer = Issuer(show_key(ONE, "one"))
    keys = issuer.open()
    assert await find(keys, "one") == ["one"] and issuer.asked == 1
    for _ in range(50):
        assert await find(keys, "two") == []
    assert issuer.asked == 1
    issuer.entries.append(show_key(TWO, "two"))
    assert await find(keys, "two") == [] and issuer.asked == 1
    issuer.now += 10
    assert await find(keys, "two") == ["two"] and issuer.asked == 2
    assert await find(keys, "one") == ["one"] and issuer.asked == 2


async def test_all_who_wait_share_one_fetch() -> None:
    issuer = Issuer(show_key(ONE, "one"))
    issuer.gate = threading.Event()
    keys = issuer.open()
    waiting = [asyncio.create_task(find(keys, kid)) for kid in ("one",) * 20 + ("other",) * 20]
    await asyncio.sleep(0.02)
    waiting[0].cancel()  # who gives up takes nobody with it
    issuer.gate.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert found[1:20] == [["one"]] * 19 and found[20:] == [[]] * 20
    assert issuer.asked == 1


async def test_known_keys_hold_while_the_issuer_is_away(caplog: pytest.LogCaptureFixture) -> None:
    issuer = Issuer(show_key(ONE, "one"))
    keys = issuer.open()
    assert await find(keys, "one") == ["one"]
    issuer.is_away = True
    for _ in range(5):
        issuer.now += 301
        assert await keys.look() is False
        await settle(keys)
        assert await find(keys, "one") == ["one"]
    with pytest.raises(IdentityUnavailable, match="the keys of the issuer cannot be had"):
        await find(keys, "two")
    assert len([each for each in caplog.records if "stay in force" in each.message]) == 1, "told once"
    issuer.is_away = False
    issuer.now += 11
    await keys.look()
    await settle(keys)
    assert await find(keys, "two") == []


async def test_keys_that_were_never_had() -> None:
    issuer = Issuer()
    issuer.is_away = True
    keys = issuer.open()
    for _ in range(3):
        with pytest.raises(IdentityUnavailable):
            await find(keys, "one")
    assert issuer.asked == 1
    issuer.is_away, issuer.entries = False, [show_key(ONE, "one")]
    issuer.now += 10
    assert await find(keys, "one") == ["one"]


async def test_a_key_that_is_taken_away() -> None:
    issuer = Issuer(show_key(ONE, "one"), show_key(TWO, "two"))
    keys = issuer.open()
    await find(keys, "one")
    assert await keys.look() is False and issuer.asked == 1
    issuer.entries.pop(0)
    issuer.now += 300
    assert await keys.look() is False, "it is only being fetched"
    await settle(keys)
    assert await keys.look() is True and await keys.look() is False
    assert await find(keys, "one") == [] and await find(keys, "two") == ["two"]


async def test_a_kid_that_changes_hands() -> None:
    issuer = Issuer(show_key(ONE, "one"))
    keys = issuer.open()
    await find(keys, "one")
    issuer.entries = [show_key(TWO, "one")]
    issuer.now += 300
    await keys.look()
    await settle(keys)
    assert await keys.look() is True, "what the old key has signed must be looked at again"


async def test_an_end_in_the_middle() -> None:
    issuer = Issuer(show_key(ONE, "one"))
    issuer.gate = threading.Event()
    keys = issuer.open()
    await keys.look()
    await asyncio.sleep(0.01)
    await keys.close()
    issuer.gate.set()


def test_what_is_taken_from_a_key_set() -> None:
    small = make_private("RS256", 3, 1024)
    keys, problems = read_key_set(
        make_key_set(
            show_key(ONE, "rsa"),
            show_key(TWO, "enc", use="enc"),
            show_key(TWO, "ops", key_ops=["encrypt"]),
            show_key(ONE, "private", is_private=True),
            show_key(small, "small"),
            {"kty": "oct", "k": "c2VjcmV0", "kid": "secret"},
            {"kty": "RSA", "n": "AQAB", "kid": "broken"},
            show_key(ONE, "alg", alg="HS256"),
            show_key(ONE, "ps", alg="PS256"),
            show_key(make_private("EdDSA"), "ed"),
            {"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA"},
        )
    )
    assert [(each.kid, len(each.algorithms)) for each in keys] == [("rsa", 6), ("ps", 1), ("ed", 1)]
    told = " ".join(problems)
    assert len(problems) == 6 and "is a private key" in told and "has 1024 bits" in told
    assert "c2VjcmV0" not in told, "a text shows a secret"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"keys": 1}', b"\xff", b"[" * 5000, json.dumps({"keys": [{}] * 101}).encode()]
)
def test_what_is_no_key_set(content: bytes) -> None:
    with pytest.raises(ValueError, match="it "):
        read_key_set(content)


def test_over_http() -> None:
    with serve_pages() as site:
        site.put_issuer(show_key(ONE, "one"))
        assert len(read_key_set(make_fetch(f"{site.url}/keys", timeout_s=5)())[0]) == 1
        assert len(read_key_set(make_discovery(site.url, timeout_s=5)())[0]) == 1
        assert len(read_key_set(make_discovery(site.url, timeout_s=5)())[0]) == 1
        site.put("/moved", b"", 302, Location=f"{site.url}/keys")
        with pytest.raises(OSError, match="answers with status 302"):
            make_fetch(f"{site.url}/moved", timeout_s=5)()
        site.put("/large", b"x" * (MAX_BYTES + 1))
        with pytest.raises(ValueError, match="more than"):
            make_fetch(f"{site.url}/large", timeout_s=5)()
        with pytest.raises(OSError, match="answers with status 404"):
            make_fetch(f"{site.url}/nothing", timeout_s=5)()


def test_descriptions_that_lie() -> None:
    with serve_pages() as site:
        path = "/.well-known/openid-configuration"
        for description, text in (
            ({"issuer": "https://other.example", "jwks_uri": f"{site.url}/keys"}, "is not that of"),
            ({"issuer": site.url}, "names no jwks_uri"),
            ({"issuer": site.url, "jwks_uri": "http://keys.example/"}, "is not https"),
            ({"issuer": site.url, "jwks_uri": "file:///etc/passwd"}, "is not https"),
            ([], "is not that of"),
        ):
            site.put(path, json.dumps(description).encode())
            with pytest.raises(ValueError, match=text):
                make_discovery(site.url, timeout_s=5)()


def test_a_server_that_does_not_answer() -> None:
    with serve_pages() as site:
        release = threading.Event()
        site.before_answer = lambda: release.wait(10)
        with pytest.raises(OSError, match=r"did not come within"):
            make_fetch(f"{site.url}/keys", timeout_s=0.1)()
        release.set()


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(make_key_set(show_key(ONE, "one")))
    assert len(read_key_set(read_file(path))[0]) == 1
    path.write_bytes(b"x" * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match="more than"):
        read_file(path)
