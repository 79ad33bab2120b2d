"""What attackers try at the doors: other ways to write a path or a method, odd tokens, certificates of others."""

from __future__ import annotations

import asyncio
import datetime
import shutil
import ssl
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from issuers import Authority, make_private, make_token, serve_pages, show_key
from secured import DOORS, KEYS, SERVICE, TIMEOUT_S, Secured, serve_secured

from aiorch_server.frontends.grpc.guard import GuardedServer
from aiorch_server.security.permissions import TABLE, Scope

DER = serialization.Encoding.DER
LOCALHOST = x509.DNSName("localhost")

# ------------------------------------------------------------------------------------------------------ permissions


async def list_registered(
    models: Path, door: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[set[str], list[tuple[str, str]]]:
    """All methods that an application puts on its gRPC door, with a registry, and what each answers to a stranger."""
    registered: set[str] = set()
    original = GuardedServer.add_registered_method_handlers

    def note(self: Any, service: str, methods: Any) -> None:
        registered.update(f"/{service}/{name}" for name in methods)
        original(self, service, methods)

    monkeypatch.setattr(GuardedServer, "add_registered_method_handlers", note)
    registry = {"url": f"sqlite:///{folder}/registry.db", "artefacts": str(folder / "artefacts")}
    async with serve_secured(models, door, registry=registry) as site:
        answers = [(path, (await site.call(path)).code) for path in sorted(registered)]
    return registered, answers


@pytest.mark.parametrize("door", DOORS)
async def test_each_method_of_each_service_has_a_row(
    models: Path, door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those that are not open to all know nobody without credentials."""
    registered, answers = await list_registered(models, door, tmp_path, monkeypatch)
    assert registered == {call for call in TABLE if call.startswith("/")}
    for path, code in answers:
        assert (code == "UNAUTHENTICATED") == (TABLE[path].scope is not Scope.OPEN), f"{path} answers {code}"


UNLOAD = "/v2/repository/models/own-one/unload"
#: The same place, for somebody who reads paths in another way.
DISGUISES = [
    "/v2/repository/models%2fown-one%2funload",
    "/v2/repository/models/own-one%2Funload",
    "/v2/repository/%6dodels/own-one/%75nload",
    "/%76%32/repository/models/own-one/unload",
    "/v2/%2e%2e/v2/repository/models/own-one/unload",
    "/v2/models/../repository/models/own-one/unload",
    "/v2/health/live/../../repository/models/own-one/unload",
    "/v2/health/live/%2e%2e/%2e%2e/repository/models/own-one/unload",
    "//v2/repository/models/own-one/unload",
    "/v2//repository//models//own-one//unload",
    "/v2/repository/models/own-one/unload/",
    "/v2/repository/models/own-one/unload.",
    "/v2/repository/models/own-one/unload%20",
    "/v2/repository/models/own-one/unload%0a",
    "/v2/repository/models/own-one/unload%00",
    "/V2/REPOSITORY/MODELS/own-one/UNLOAD",
    "/v2/repository/models/own-one;x=1/unload",
    "/v2/repository/models/own-one/unload;x=1",
    "/v2/health/live;/../../repository/models/own-one/unload",
    "/v2/health/live?/../../repository/models/own-one/unload",
    "/v2/repository/models/own-one/unload?model=other-one",
    "/v2\\repository\\models\\own-one\\unload",
    "/v2/repository/models/own-one%252funload",
    "http://localhost/v2/repository/models/own-one/unload",
    "http://localhost/v2/health/live/../../repository/models/own-one/unload",
    "v2/repository/models/own-one/unload",
    "*",
    "/v2/repository/models/own-on\xc3\xa9/unload",
    "/v2/repository/models/own-one/versions/\xb2/unload",
    UNLOAD,
]
OVERRIDES = ("x-http-method-override", "x-http-method", "x-method-override", "x-original-url", "x-rewrite-url")


async def send_raw(port: int | None, head: str, body: bytes = b"") -> bytes:
    reader, writer = await asyncio.open_connection("localhost", port)
    try:
        writer.write(head.encode("latin-1") + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body)
        return await asyncio.wait_for(reader.read(), TIMEOUT_S)
    finally:
        writer.close()


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def test_no_way_to_write_a_path_goes_round(models: Path) -> None:
    """Neither for strangers nor for who may only look: models stay as they are, and other ones hidden."""
    async with serve_secured(models) as site:
        port = site.application.http_port
        for target in DISGUISES:
            for caller in (None, "viewer"):
                shown = f"authorization: Bearer {KEYS[caller].text}\r\n" if caller else ""
                for method in ("POST", "GET", "PUT", "HEAD", "OPTIONS", "TRACE", "post", "UNLOAD"):
                    answer = await send_raw(port, f"{method} {target} HTTP/1.1\r\nhost: x\r\n{shown}", b"{}")
                    is_health = target.startswith("/v2/health/live?") and method in ("GET", "HEAD")
                    assert is_health or 400 <= status_of(answer) < 500, f"{method} {target}: {answer!r}"
        for hidden in (
            "/v2/models/own-one/../other-one",
            "/v2/models/other%2done",
            "/v2/models/own-one%2f..%2fother-one",
        ):
            shown = f"authorization: Bearer {KEYS['viewer'].text}\r\n"
            answer = await send_raw(port, f"GET {hidden} HTTP/1.1\r\nhost: x\r\n{shown}")
            assert 400 <= status_of(answer) < 500 and b"INPUT0" not in answer
        assert (await site.ask("GET", "/v2/models/own-one/ready", "viewer")).status_code == 200


async def test_no_header_says_another_method_or_path(models: Path) -> None:
    async with serve_secured(models) as site:
        for name in OVERRIDES:
            for value in ("POST", "DELETE", UNLOAD):
                looked = await site.ask("GET", "/v2/models/own-one", "viewer", headers={name: value})
                assert looked.status_code == 200 and looked.json()["name"] == "own-one"
                refused = await site.ask("GET", UNLOAD, "deployer", headers={name: value})
                assert refused.status_code == 405
                assert (await site.ask("POST", UNLOAD, "viewer", headers={name: "GET"})).status_code == 403
        assert (await site.ask("GET", "/v2/models/own-one/ready", "viewer")).status_code == 200


# ----------------------------------------------------------------------------------------------------------- tokens


def make_tokens_section(issuer: str) -> dict[str, Any]:
    return {
        "tokens": [{"issuer": issuer, "audience": ["aiorch"], "jwks_url": f"{issuer}/keys", "prefix": "corp:"}],
        "bindings": [{"principal": "corp:alice", "role": "client"}],
    }


@pytest.mark.parametrize("door", DOORS)
async def test_a_flood_of_unknown_keys_asks_the_issuer_once(models: Path, door: str) -> None:
    with serve_pages() as issuer:
        issuer.put_issuer(show_key(make_private("RS256"), "one"))
        async with serve_secured(models, door, security=make_tokens_section(issuer.url)) as site:
            assert (await site.infer(make_token(iss=issuer.url))).code == "OK"
            asked = len(issuer.asked)
            floods = [site.infer(make_token(iss=issuer.url, kid=f"k{number}")) for number in range(100)]
            floods += [site.infer(make_token(iss=issuer.url, kid=None)) for _ in range(1)]
            codes = [each.code for each in await asyncio.gather(*floods)]
            assert codes == ["UNAUTHENTICATED"] * 100 + ["OK"]
            assert len(issuer.asked) <= asked + 1


@pytest.mark.parametrize("door", DOORS)
async def test_odd_tokens_at_the_doors(models: Path, door: str) -> None:
    """Two keys of one name are both tried; what is huge, deep, from the future or in the wrong place is refused."""
    with serve_pages() as issuer:
        second = make_private("RS256", 1)
        issuer.put_issuer(show_key(make_private("RS256"), "one"), show_key(second, "one"))
        async with serve_secured(models, door, security=make_tokens_section(issuer.url)) as site:
            own = {"iss": issuer.url}
            for good in (make_token(**own), make_token(key=second, **own), make_token(**own, pad="x" * 3000)):
                assert (await site.infer(good)).code == "OK"
                assert (await site.ask("GET", "/v2", good)).status_code == 200
            later = int(time.time()) + 3600
            deep: Any = []
            for _ in range(400):
                deep = [deep]
            for bad in (
                make_token(nbf=later, **own), make_token(iat=later, exp=later + 60, **own),
                make_token(key=make_private("RS256", 2), pad="x" * 3000, **own),
                make_token(key=make_private("RS256", 2), pad=deep, **own),
                make_token(header={"crit": ["x"], "x": 1}, **own), make_token(header={"b64": False}, **own),
            ):  # fmt: skip
                assert (await site.infer(bad)).code == "UNAUTHENTICATED"
                assert (await site.ask("GET", "/v2", bad)).status_code == 401
            token = make_token(**own)
            for query in ("access_token", "authorization", "token"):
                assert (await site.ask("GET", f"/v2?{query}={token}")).status_code == 401
            for name in ("proxy-authorization", "x-authorization", "cookie", "authorization-bin"):
                assert (await site.ask("GET", "/v2", headers={name: f"Bearer {token}"})).status_code == 401
            for pair in ((token, "x"), ("x", token), (token, token)):
                metadata = [("authorization", f"Bearer {each}") for each in pair]
                assert (await site.call(f"{SERVICE}/ServerMetadata", metadata=metadata)).code == "UNAUTHENTICATED"


# ------------------------------------------------------------------------------------------------------ mutual TLS


def issue(authority: Authority, name: str, *, usage: Any = None, age_days: int = 0, is_own: bool = False) -> Path:
    """A certificate that is right but for what the arguments say; ``is_own``: signed with its own key."""
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=age_days)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject if is_own else authority._name)
        .public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(hours=1))
    )  # fmt: skip
    if usage is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    return authority._write(name, builder.sign(key if is_own else authority._key, hashes.SHA256()), key)


def section_of(authority: Authority, server: Path, **more: Any) -> dict[str, Any]:
    files = {"certificate": str(server), "key": str(server.with_suffix(".key")), "root": str(authority.pem)}
    return {"tls": {**files, "require_client_auth": True, **more}}


def open_credentials(authority: Authority, client: Path | None) -> grpc.ChannelCredentials:
    if client is None:
        return grpc.ssl_channel_credentials(authority.pem.read_bytes())
    key = client.with_suffix(".key").read_bytes()
    return grpc.ssl_channel_credentials(authority.pem.read_bytes(), key, client.read_bytes())


def open_context(authority: Authority, client: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.pem)
    if client is not None:
        context.load_cert_chain(client, client.with_suffix(".key"))
    return context


async def call_as(site: Secured, authority: Authority, client: Path | None) -> tuple[str, str]:
    """What gRPC and REST answer to a new connection with that certificate."""
    target = f"localhost:{site.application.grpc_port}"
    async with grpc.aio.secure_channel(target, open_credentials(authority, client)) as channel:
        code = (await Secured(site.application, channel, site.http).infer(None)).code
    try:
        async with httpx.AsyncClient(verify=open_context(authority, client), timeout=TIMEOUT_S) as http:
            answer = await http.get(f"https://localhost:{site.application.http_port}/v2/models/own-one")
    except httpx.HTTPError:
        return code, "shut out"
    return code, str(answer.status_code)


@pytest.mark.parametrize("door", DOORS)
async def test_certificates_that_do_not_hold(models: Path, door: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")  # of the same name
    server = authority.issue("localhost", LOCALHOST)
    wrong = {
        "no certificate": None,
        "expired": issue(authority, "robot", age_days=2),
        "not yet valid": issue(authority, "early", age_days=-2),
        "self-signed": issue(authority, "selfmade", is_own=True),
        "of another authority": other.issue("robot"),
        "for servers alone": issue(authority, "web", usage=ExtendedKeyUsageOID.SERVER_AUTH),
    }
    robot = issue(authority, "good", usage=ExtendedKeyUsageOID.CLIENT_AUTH)
    section = section_of(authority, server)
    security = {"bindings": [
        {"principal": name, "role": "client"} for name in ("robot", "good", "early", "selfmade", "web")
    ]}  # fmt: skip
    async with serve_secured(
        models, door, grpc=section, http=section, security=security,
        credentials=open_credentials(authority, robot), verify=open_context(authority, robot),
    ) as site:  # fmt: skip
        assert await call_as(site, authority, robot) == ("OK", "200")
        for what, client in wrong.items():
            assert await call_as(site, authority, client) == ("UNAVAILABLE", "shut out"), what
        assert await call_as(site, authority, robot) == ("OK", "200")


@pytest.mark.parametrize("door", DOORS)
async def test_grpcs_certificate_is_replaced_while_it_serves(models: Path, door: str, tmp_path: Path) -> None:
    authority, own = Authority(tmp_path), tmp_path / "own.pem"
    robot = authority.issue("robot")

    def put(source: Path) -> None:
        for suffix in (".key", ".pem"):
            shutil.copy(source.with_suffix(suffix), own.with_suffix(suffix))

    put(authority.issue("first", LOCALHOST))
    section = section_of(authority, own, reload_secs=0.02)
    security = {"bindings": [{"principal": "robot", "role": "client"}]}
    async with serve_secured(
        models, door, grpc=section, security=security, credentials=open_credentials(authority, robot)
    ) as site:
        assert (await site.infer(None)).code == "OK"
        second = authority.issue("second", LOCALHOST)
        put(second)

        async def read_served() -> bytes:
            context = open_context(authority, robot)
            context.set_alpn_protocols(["h2"])
            _, writer = await asyncio.open_connection("localhost", site.application.grpc_port, ssl=context)
            served = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
            return bytes(served)

        wanted = x509.load_pem_x509_certificate(second.read_bytes()).public_bytes(DER)
        async with asyncio.timeout(TIMEOUT_S):
            while await read_served() != wanted:
                await asyncio.sleep(0.02)
        assert (await site.infer(None)).code == "OK", "the connection from before"
