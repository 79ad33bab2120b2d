"""Addresses, TLS, mutual TLS; health and reflection plugged in unchanged."""

from __future__ import annotations

import ast
import secrets
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import proto_reflection_descriptor_database as reflection_client
from grpc_reflection.v1alpha import reflection

from aiorch_server.frontends.grpc import NativeGrpcServer, ServerCredentials

from .conftest import NATIVE, NATIVE_AND_TWO_THREADS, TIMEOUT_S, Door, wait_until

Certificates = Callable[[str], bytes]


def info_of(door: Door, channel: grpc.Channel) -> dict[str, Any]:
    info: dict[str, Any] = ast.literal_eval(door.call("Info", channel)(b"", timeout=TIMEOUT_S).decode())
    return info


# ------------------------------------------------------------------------------------------------------- addresses
def test_ipv6(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, "[::1]:0")
    assert info_of(door, door.channel())["peer"].startswith("ipv6:%5B::1%5D:")


def test_unix_socket(make_door: Callable[..., Door], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "door.sock"
    door = make_door(kind, f"unix:{path}")
    assert info_of(door, door.channel())["peer"].startswith("unix:")
    door.check_next_call()
    door.stop(None).result(TIMEOUT_S)
    assert not path.exists()


@pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)
def test_a_unix_socket_left_behind_is_replaced(make_door: Callable[..., Door], kind: str, tmp_path: Path) -> None:
    path = tmp_path / "door.sock"
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(path))
    make_door(kind, f"unix:{path}").check_next_call()
    with pytest.raises(RuntimeError, match="Failed to bind to address unix:"):
        NativeGrpcServer().add_insecure_port(f"unix:{path}")


def test_abstract_unix_socket(make_door: Callable[..., Door], kind_or_two: str) -> None:
    name = f"unix-abstract:aiorch-{secrets.token_hex(8)}"
    door = make_door(kind_or_two, name)
    assert info_of(door, door.channel())["peer"].startswith("unix")
    with pytest.raises(RuntimeError, match=r"Failed to bind to address unix-abstract:.* in use"):
        NativeGrpcServer().add_insecure_port(name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("x" * 108, "the name has [0-9]+ bytes; a unix socket's ends at 107"),
        ("missing/door.sock", "the folder .*missing does not exist"),
        ("folder", "this is a folder"),
        ("file", "a file that is no socket; it is left alone"),
    ],
)
def test_bad_unix_sockets(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RuntimeError, match=f"Failed to bind to address unix:.*({why})"):
        NativeGrpcServer().add_insecure_port(f"unix:{tmp_path / name}")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(RuntimeError, match="expected a name behind unix-abstract:"):
        NativeGrpcServer().add_insecure_port("unix-abstract:")


def test_a_unix_socket_is_every_threads(make_door: Callable[..., Door], tmp_path: Path) -> None:
    door = make_door("native-uvloop-2", f"unix:{tmp_path / 'door.sock'}")
    channels = [door.channel() for _ in range(40)]
    for channel in channels:
        door.check_next_call(channel)
    assert sum(driver.connections for driver in door.server._drivers) == 40


@pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)
def test_a_shared_port(make_door: Callable[..., Door], kind: str) -> None:
    """Two servers on one port: both get connections; who does not want to share is refused."""
    doors = [make_door(kind, reuse_port=True)]
    doors.append(make_door(kind, f"127.0.0.1:{doors[0].port}", reuse_port=True))
    for _ in range(40):
        doors[0].check_next_call(doors[0].channel())
    assert all(door.server.connections > 5 for door in doors)
    assert sum(door.server.connections for door in doors) == 40
    with pytest.raises(RuntimeError, match="Failed to bind"):
        NativeGrpcServer(io_threads=2).add_insecure_port(f"127.0.0.1:{doors[0].port}")
    if kind.endswith("2"):
        return  # its threads share the port with each other: nothing keeps out who asks to share it too
    alone = make_door(kind)
    with pytest.raises(RuntimeError, match="Failed to bind"):
        NativeGrpcServer(io_threads=0, reuse_port=True).add_insecure_port(f"127.0.0.1:{alone.port}")


def test_every_address_of_the_machine(make_door: Callable[..., Door], kind_or_two: str) -> None:
    door = make_door(kind_or_two, "[::]:0")
    for host, peer in (("127.0.0.1", "127.0.0.1"), ("[::1]", "%5B::1%5D")):
        door.target = f"{host}:{door.port}"
        assert peer in info_of(door, door.channel())["peer"]


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:99999", "127.0.0.1:x", "::1:80", "nowhere.invalid:1"])
def test_bad_addresses(address: str) -> None:
    with pytest.raises(RuntimeError, match="Failed to bind to address"):
        NativeGrpcServer().add_insecure_port(address)


@pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)
@pytest.mark.parametrize("io_threads", [0, 1, 2])
def test_a_taken_port_is_refused(make_door: Callable[..., Door], kind: str, io_threads: int) -> None:
    door = make_door(kind)
    with pytest.raises(RuntimeError, match=f"Failed to bind to address 127.0.0.1:{door.port}"):
        NativeGrpcServer(io_threads=io_threads).add_insecure_port(f"127.0.0.1:{door.port}")


def test_ports_come_before_start(native_door: Door) -> None:
    async def add() -> None:
        native_door.server.add_insecure_port("127.0.0.1:0")

    with pytest.raises(RuntimeError, match="before the server is started"):
        native_door.run(add())
    with pytest.raises(grpc.aio.UsageError):
        native_door.run(native_door.server.start())


# ------------------------------------------------------------------------------------------------------------- TLS
def test_tls(
    make_door: Callable[..., Door], kind: str, credentials: ServerCredentials, certificates: Certificates
) -> None:
    door = make_door(kind, credentials=credentials)
    channel = door.channel(grpc.ssl_channel_credentials(certificates("ca.crt")))
    auth = info_of(door, channel)["auth"]
    assert auth["transport_security_type"] == [b"ssl"]
    assert "x509_common_name" not in auth
    content = bytes(range(256)) * 20_000
    channel = door.channel(grpc.ssl_channel_credentials(certificates("ca.crt")), max_receive_message_length=-1)
    assert door.call("Echo", channel)(content, timeout=TIMEOUT_S) == content


def test_mutual_tls(make_door: Callable[..., Door], kind: str, certificates: Certificates) -> None:
    credentials = ServerCredentials(
        certificates("server.key"), certificates("server.crt"), certificates("ca.crt"), require_client_auth=True
    )
    door = make_door(kind, credentials=credentials)
    known = grpc.ssl_channel_credentials(certificates("ca.crt"), certificates("client.key"), certificates("client.crt"))
    info = info_of(door, door.channel(known))
    assert info["auth"]["x509_common_name"] == [b"somebody"]
    assert info["auth"]["x509_pem_cert"][0].startswith(b"-----BEGIN CERTIFICATE-----")
    assert (info["key"], info["identities"]) == ("x509_subject_alternative_name", [b"client.example"])
    stranger = grpc.ssl_channel_credentials(certificates("ca.crt"), certificates("bad.key"), certificates("bad.crt"))
    for refused in (stranger, grpc.ssl_channel_credentials(certificates("ca.crt"))):
        with pytest.raises(grpc.RpcError) as caught:
            door.call("Echo", door.channel(refused))(b"x", timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    door.check_next_call(door.channel(known))


@pytest.mark.parametrize("protocols", [[], ["http/1.1"]])
def test_tls_without_h2_is_closed(
    make_door: Callable[..., Door], credentials: ServerCredentials, protocols: list[str]
) -> None:
    for kind in NATIVE:
        door = make_door(kind, credentials=credentials)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if protocols:
            context.set_alpn_protocols(protocols)
        with socket.create_connection(("127.0.0.1", door.port), TIMEOUT_S) as raw:
            try:
                with context.wrap_socket(raw) as tls:
                    assert tls.selected_alpn_protocol() is None
                    assert tls.recv(100) == b""
            except (ssl.SSLError, ConnectionResetError):
                pass  # an abrupt end is as good
        wait_until(lambda door=door: door.server.connections == 0)  # type: ignore[misc]


def test_plain_text_on_a_tls_port(make_door: Callable[..., Door], kind: str, credentials: ServerCredentials) -> None:
    door = make_door(kind, credentials=credentials)
    with pytest.raises(grpc.RpcError) as caught:
        door.call("Echo")(b"x", timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_credentials_are_checked_early(certificates: Certificates) -> None:
    with pytest.raises(ValueError, match="needs root_certificates"):
        ServerCredentials(b"", b"", require_client_auth=True)
    with pytest.raises(ValueError, match="not usable PEM"):
        ServerCredentials(certificates("client.key"), certificates("server.crt")).make_ssl_context()
    with pytest.raises(ValueError, match="not usable PEM"):
        ServerCredentials(b"no", b"pem").make_ssl_context()
    theirs = grpc.ssl_server_credentials([(certificates("server.key"), certificates("server.crt"))])
    with pytest.raises(TypeError, match="grpc's own hide their key"):
        NativeGrpcServer().add_secure_port("127.0.0.1:0", theirs)
    assert "BEGIN" not in repr(ServerCredentials(certificates("server.key"), b"chain"))


# -------------------------------------------------------------------------------------------- health and reflection
def test_health(make_door: Callable[..., Door], kind: str) -> None:
    servicer = health.aio.HealthServicer()
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    door = make_door(kind, register=lambda server: health_pb2_grpc.add_HealthServicer_to_server(servicer, server))
    door.run(servicer.set("x", serving))
    stub = health_pb2_grpc.HealthStub(door.channel())
    assert stub.Check(health_pb2.HealthCheckRequest(service="x"), timeout=TIMEOUT_S).status == serving
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="x"), timeout=TIMEOUT_S)
    assert next(watch).status == serving
    door.run(servicer.set("x", not_serving))
    assert next(watch).status == not_serving
    watch.cancel()
    door.check_next_call()


def test_reflection(make_door: Callable[..., Door], kind: str) -> None:
    names = (health.SERVICE_NAME, reflection.SERVICE_NAME)
    door = make_door(kind, register=lambda server: reflection.enable_server_reflection(names, server))
    database = reflection_client.ProtoReflectionDescriptorDatabase(door.channel())
    assert set(database.get_services()) == set(names)
    file = database.FindFileContainingSymbol("grpc.health.v1.Health")
    assert "HealthCheckRequest" in [message.name for message in file.message_type]
