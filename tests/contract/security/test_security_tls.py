"""TLS at all doors, callers by their certificates, and doors that must not be open."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from issuers import Authority
from pydantic import ValidationError
from secured import DOORS, SERVICE, TIMEOUT_S, Secured, serve_secured

from aiorch_server.app import Application
from aiorch_server.config.load import load_server_config
from aiorch_server.config.server import ServerConfig
from aiorch_server.errors import InvalidSettings
from aiorch_server.security import AuthMethod, current_principal

LOCALHOST = x509.DNSName("localhost")
SPIFFE = "spiffe://example.org/ns/ml/sa/robot"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server_pem(authority: Authority) -> Path:
    return authority.issue("localhost", LOCALHOST)


def tls(server: Path, authority: Authority, *, is_mutual: bool = True, **more: Any) -> dict[str, Any]:
    section = {"certificate": str(server), "key": str(server.with_suffix(".key")), **more}
    return {**section, "root": str(authority.pem), "require_client_auth": True} if is_mutual else section


def open_context(authority: Authority, client: Path | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.pem)
    if client is not None:
        context.load_cert_chain(client, client.with_suffix(".key"))
    return context


def open_credentials(authority: Authority, client: Path) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        authority.pem.read_bytes(), client.with_suffix(".key").read_bytes(), client.read_bytes()
    )


def serve_mutual(models: Path, door: str, authority: Authority, server: Path, client: Path, **more: Any) -> Any:
    section = {"tls": tls(server, authority)}
    return serve_secured(
        models, door, grpc=section, http=section, metrics=section, credentials=open_credentials(authority, client),
        verify=open_context(authority, client), **more,
    )  # fmt: skip


async def identify(site: Secured, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Who calls, as code behind both doors sees it."""
    seen = []
    control = site.application.controlplane
    original = control.server_metadata

    def note() -> Any:
        seen.append(current_principal.get())
        return original()

    monkeypatch.setattr(control, "server_metadata", note)
    assert (await site.call(f"{SERVICE}/ServerMetadata")).code == "OK"
    assert (await site.http.get("/v2")).status_code == 200
    return seen


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("alternatives", "certificates", "name"),
    [
        ((), {}, "robot"),
        ((x509.DNSName("robot.example.org"),), {}, "robot.example.org"),
        ((x509.UniformResourceIdentifier(SPIFFE), x509.DNSName("robot.example.org")), {}, SPIFFE),
        ((x509.UniformResourceIdentifier(SPIFFE),), {"uri_prefix": "spiffe://other.org/"}, "robot"),
        ((x509.RFC822Name("robot@example.org"),), {"names": ["email"], "prefix": "mail:"}, "mail:robot@example.org"),
        ((x509.DNSName("a.example.org"),), {"names": ["common-name"]}, "robot"),
    ],
)
async def test_a_certificate_names_its_caller(
    models: Path, authority: Authority, server_pem: Path, monkeypatch: pytest.MonkeyPatch, door: str,
    alternatives: Any, certificates: Any, name: str,
) -> None:  # fmt: skip
    client = authority.issue("robot", *alternatives, units=("ml", "ops"), organisation="factory")
    security = {"certificates": certificates}
    async with serve_mutual(models, door, authority, server_pem, client, security=security) as site:
        callers = await identify(site, monkeypatch)
        assert {each.name for each in callers} == {name} and len(callers) == 2
        prefix = certificates.get("prefix", "")
        for each in callers:
            assert each.method is AuthMethod.CERTIFICATE and each.tenant == f"{prefix}factory"
            assert each.groups == (f"{prefix}ml", f"{prefix}ops") and each.expires_ns > 0


@pytest.mark.parametrize("door", DOORS)
async def test_roles_by_certificate(models: Path, authority: Authority, server_pem: Path, door: str) -> None:
    client = authority.issue("robot", units=("ml",))
    security = {"bindings": [{"principal": "group:ml", "role": "client", "models": "own-*"}]}
    async with serve_mutual(models, door, authority, server_pem, client, security=security) as site:
        assert (await site.infer(None)).code == "OK"
        assert (await site.infer(None, "other-one")).text.endswith("is not found")
        assert (await site.ask("GET", "/v2/models/own-one")).status_code == 200
        assert (await site.ask("GET", "/v2/models/other-one")).status_code == 400
        url = f"https://localhost:{site.application.metrics_port}/metrics"
        assert (await site.http.get(url)).status_code == 403
        if door != "grpcio":
            assert site.application._passes is not None and site.application._passes.entries == 1
            site.application._gate = None  # nobody could be asked any more
            calls = [await site.infer(None) for _ in range(5)]
            assert {each.code for each in calls} == {"OK"}


@pytest.mark.parametrize("door", DOORS)
async def test_a_header_is_judged_alone(models: Path, authority: Authority, server_pem: Path, door: str) -> None:
    """Beside a certificate that would do, a wrong header is wrong, and a right one says who calls."""
    client = authority.issue("robot")
    security = {"bindings": [{"principal": "robot", "role": "admin"}]}
    async with serve_mutual(models, door, authority, server_pem, client, security=security) as site:
        assert (await site.infer(None)).code == "OK"
        assert (await site.infer("gibberish")).code == "UNAUTHENTICATED"
        assert (await site.infer("nothing")).text.endswith("is not found")
        assert (await site.ask("GET", "/v2", "gibberish")).status_code == 401
        assert (await site.ask("GET", "/v2/models/own-one", "nothing")).status_code == 400


async def test_strangers_do_not_get_through_the_handshake(
    models: Path, authority: Authority, server_pem: Path, tmp_path: Path
) -> None:
    client = authority.issue("robot")
    forged = Authority(tmp_path).issue("robot")
    async with serve_mutual(models, "native-1", authority, server_pem, client) as site:
        for stranger in (None, forged):
            context = open_context(authority, stranger)
            for port in (site.application.http_port, site.application.metrics_port):
                with pytest.raises(httpx.HTTPError):
                    async with httpx.AsyncClient(verify=context) as http:
                        await http.get(f"https://localhost:{port}/metrics")


async def test_https_with_tokens_alone(models: Path, authority: Authority, server_pem: Path) -> None:
    section = {"tls": tls(server_pem, authority, is_mutual=False)}
    async with serve_secured(models, http=section, verify=open_context(authority)) as site:
        assert (await site.ask("GET", "/v2/models/own-one", "viewer")).status_code == 200
        assert (await site.ask("GET", "/v2/models/own-one")).status_code == 401
        with pytest.raises(httpx.HTTPError):
            await site.http.get(f"http://localhost:{site.application.http_port}/v2")
        reader, writer = await asyncio.open_connection("localhost", site.application.http_port)
        writer.write(b"GET /v2 HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b"aiorchestrator" not in await asyncio.wait_for(reader.read(), TIMEOUT_S)
        writer.close()


async def test_a_certificate_is_replaced_while_the_doors_serve(
    models: Path, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """New connections of REST and metrics get what is in the files; what cannot be used changes nothing."""
    own = tmp_path / "server.pem"

    def put(source: Path) -> None:
        for suffix in (".key", ".pem"):
            shutil.copy(source.with_suffix(suffix), own.with_suffix(suffix))

    put(authority.issue("first", LOCALHOST))
    section = {"tls": tls(own, authority, is_mutual=False, reload_secs=0.02)}

    def read_name(port: int | None) -> bytes:
        return ssl.get_server_certificate(("localhost", port or 0)).encode()

    async with serve_secured(models, http=section, metrics=section, verify=open_context(authority)) as site:
        ports = (site.application.http_port, site.application.metrics_port)
        assert (await site.ask("GET", "/v2", "viewer")).status_code == 200
        second = authority.issue("second", LOCALHOST)
        put(second)
        for port in ports:
            async with asyncio.timeout(TIMEOUT_S):
                while await asyncio.to_thread(read_name, port) != second.read_bytes():
                    await asyncio.sleep(0.02)
        own.write_text("nonsense")
        async with asyncio.timeout(TIMEOUT_S):
            while "REST's TLS" not in caplog.text or "metrics's TLS" not in caplog.text:
                await asyncio.sleep(0.02)
        assert await asyncio.to_thread(read_name, ports[0]) == second.read_bytes()
        assert (await site.ask("GET", "/v2", "viewer")).status_code == 200


DOOR_NAMES = ("grpc", "http", "metrics")


def load(**sections: Any) -> ServerConfig:
    return ServerConfig.model_validate({name: {"port": 0} for name in DOOR_NAMES} | sections)


@pytest.mark.parametrize("door", DOOR_NAMES)
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", "*", "fe80::1"])
def test_an_open_door_is_refused(door: str, host: str) -> None:
    with pytest.raises(ValidationError) as raised:
        load(**{door: {"port": 0, "host": host}})
    told = str(raised.value)
    assert f"{door}.tls.certificate" in told and "security.enabled" in told and "--insecure" in told


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "unix:/tmp/x", "unix-abstract:x"])
def test_doors_of_this_machine_are_free(host: str) -> None:
    load(grpc={"port": 0, "host": host})


def test_what_an_open_door_needs(authority: Authority, server_pem: Path) -> None:
    closed = {name: {"enabled": False} for name in ("http", "metrics")}
    plain = {"enabled": True, "api_keys": [{"id": "abcd", "sha256": "0" * 64, "principal": "alice"}]}
    mutual, one_sided = tls(server_pem, authority), tls(server_pem, authority, is_mutual=False)
    load(grpc={"host": "0.0.0.0", "tls": mutual}, **closed)
    load(grpc={"host": "0.0.0.0", "tls": one_sided}, security=plain, **closed)
    load(grpc={"host": "0.0.0.0"}, security={"insecure": True}, **closed)
    load(grpc={"port": 0}, http={"enabled": False, "host": "0.0.0.0"}, metrics={"enabled": False})
    for grpc_section, security, lack in (
        ({"tls": one_sided}, {}, "callers who say who they are"),
        ({}, plain, "needs TLS (grpc.tls.certificate and key), or --insecure"),
    ):
        with pytest.raises(ValidationError, match=r"found '0\.0\.0\.0', which other machines reach") as raised:
            load(grpc={"host": "0.0.0.0", **grpc_section}, security=security, **closed)
        assert lack in str(raised.value)


def test_the_option_names_the_setting() -> None:
    with pytest.raises(InvalidSettings, match=r"http.host: found '0.0.0.0'.*from option --http-address"):
        load_server_config({"http_address": "0.0.0.0"}, environment={})
    assert load_server_config({"http_address": "0.0.0.0", "insecure": True}, environment={}).security.insecure


async def test_an_insecure_start_is_told(caplog: pytest.LogCaptureFixture) -> None:
    config = load(http={"port": 0, "host": "0.0.0.0"}, security={"insecure": True})
    with caplog.at_level(logging.WARNING):
        async with Application(config):
            told = [each.message for each in caplog.records if "security.insecure" in each.message]
    assert len(told) == 1 and told[0].startswith("http is open although it should not be")


async def test_nobody_could_say_who_one_is() -> None:
    with pytest.raises(InvalidSettings, match="no way to say who one is"):
        async with Application(load(security={"enabled": True})):
            pass


def test_keys_are_of_no_use_unless_enabled() -> None:
    with pytest.raises(ValidationError, match=r"has no use without security\.enabled"):
        load(security={"bindings": [{"principal": "alice", "role": "admin"}]})
