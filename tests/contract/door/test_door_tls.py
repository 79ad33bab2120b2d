"""TLS on the I/O threads, and beside them on the loop: what is refused, what is cut short, what is never mixed up."""

from __future__ import annotations

import ast
import contextlib
import gc
import os
import select
import socket
import ssl
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from hand_driven import message, values_of
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, PingFrame, SettingsFrame, WindowUpdateFrame

from aiorch_server import _core
from aiorch_server._core import IoThread
from aiorch_server.frontends.grpc import FAST_PATH, ConnectionLimits, ServerCredentials

from .conftest import NATIVE, NATIVE_AND_TWO_THREADS, SERVICE, TIMEOUT_S, Door, wait_until
from .test_door_attacks import PREFACE, headers
from .test_door_attacks import message as frame_of
from .test_door_threads import THREADS, Instance, route_to

GREETING = PREFACE + SettingsFrame(0).serialize()
SETTINGS_ACK = SettingsFrame(0, flags=["ACK"]).serialize()
Certificates = Callable[[str], bytes]
MakeDoor = Callable[..., Door]


@pytest.fixture
def instance() -> Iterator[Instance]:
    running = Instance()
    yield running
    running.stop()


@pytest.fixture
def mutual(certificates: Certificates) -> ServerCredentials:
    return ServerCredentials(
        certificates("server.key"), certificates("server.crt"), certificates("ca.crt"), require_client_auth=True
    )


def trust(certificates: Certificates) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(certificates("ca.crt"))


def make_context(*protocols: str) -> ssl.SSLContext:
    """A client that believes everything and negotiates these protocols."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


class Client:
    """A client that decides itself when which byte goes out; ``pace`` bytes at a time."""

    def __init__(self, door: Door, context: ssl.SSLContext | None = None, pace: int = 1 << 30, session: Any = None):
        self.socket = socket.create_connection(("127.0.0.1", door.port), TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = (context or make_context("h2")).wrap_bio(self.incoming, self.outgoing, session=session)
        self.pace = pace
        self.received = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def push(self) -> None:
        data = self.outgoing.read()
        for at in range(0, len(data), self.pace):
            self.socket.sendall(data[at : at + self.pace])

    def do(self, step: Callable[..., Any], *arguments: Any) -> Any:
        """A step of TLS, with as many bytes to and fro as it takes; EOFError: the server has closed."""
        while True:
            try:
                result = step(*arguments)
                self.push()
                return result
            except ssl.SSLWantReadError:
                self.push()
                data = self.socket.recv(65536)
                if not data:
                    raise EOFError from None
                self.incoming.write(data)

    def greet(self) -> Client:
        self.do(self.tls.do_handshake)
        self.do(self.tls.write, GREETING)
        return self

    def read_until(self, is_enough: Callable[[list[Frame]], bool]) -> list[Frame]:
        while not is_enough(frames := self.frames()):
            self.received += self.do(self.tls.read, 65536) or self.close_early()
        return frames

    def close_early(self) -> bytes:
        raise EOFError(f"closed after {self.frames()}")

    def frames(self) -> list[Frame]:
        found, data = [], memoryview(self.received)
        while len(data) >= 9:
            frame, size = Frame.parse_frame_header(data[:9])
            if len(data) < 9 + size:
                break
            frame.parse_body(data[9 : 9 + size])
            found.append(frame)
            data = data[9 + size :]
        return found

    def ask(self, method: str, content: bytes, stream_id: int = 1) -> bytes:
        """One call; the message of its answer."""
        request = headers(stream_id, f"/{SERVICE}/{method}", "END_HEADERS")
        data = DataFrame(stream_id, frame_of(content), flags=["END_STREAM"]).serialize()
        self.do(self.tls.write, request + data)
        frames = self.read_until(lambda frames: any(is_end_of(frame, stream_id) for frame in frames))
        parts = [frame.data for frame in frames if isinstance(frame, DataFrame) and frame.stream_id == stream_id]
        return b"".join(parts)[5:]

    def is_closed_soon(self) -> bool:
        """Whether the server closes the connection, whatever it says before."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True


def is_end_of(frame: Frame, stream_id: int) -> bool:
    return isinstance(frame, HeadersFrame) and frame.stream_id == stream_id and "END_STREAM" in frame.flags


def count_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# ----------------------------------------------------------------------------------------------- early ends first
@pytest.mark.parametrize("kind", NATIVE)
def test_a_client_that_goes_in_the_middle_of_the_handshake(
    make_door: MakeDoor, kind: str, credentials: ServerCredentials, certificates: Certificates
) -> None:
    door = make_door(kind, credentials=credentials)
    before = count_descriptors()
    context = make_context("h2")
    for sent in (0, 1, 5, 6, 50, 150, 10_000):
        for is_abrupt in (False, True):
            with Client(door, context) as client:
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.tls.do_handshake()
                client.socket.sendall(client.outgoing.read()[:sent])
                if is_abrupt:  # SO_LINGER 0: a reset
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    with Client(door, context) as client:  # after the server's flight
        with contextlib.suppress(ssl.SSLWantReadError):
            client.tls.do_handshake()
        client.push()
        client.socket.recv(1)
    wait_until(lambda: door.server.connections == 0)
    wait_until(lambda: count_descriptors() <= before, "the descriptors of those that went")
    door.check_next_call(door.channel(trust(certificates)))


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("stage", ["silent", "half a hello", "no finish", "no preface"])
def test_a_client_that_stalls_is_closed(
    make_door: MakeDoor, kind: str, stage: str, credentials: ServerCredentials, certificates: Certificates
) -> None:
    door = make_door(kind, credentials=credentials, limits=ConnectionLimits(greeting_timeout_s=0.3))
    with Client(door) as client:
        client.socket.settimeout(5.0)
        if stage == "no preface":
            client.do(client.tls.do_handshake)
        elif stage != "silent":
            with contextlib.suppress(ssl.SSLWantReadError):
                client.tls.do_handshake()
            hello = client.outgoing.read()
            client.socket.sendall(hello if stage == "no finish" else hello[: len(hello) // 2])
        begun = time.monotonic()
        assert client.is_closed_soon()
        assert time.monotonic() - begun > 0.15
    wait_until(lambda: door.server.connections == 0)
    door.check_next_call(door.channel(trust(certificates)))


@pytest.mark.parametrize("kind", THREADS)
def test_a_stalled_handshake_does_not_hold_up_the_end(
    make_door: MakeDoor, kind: str, credentials: ServerCredentials
) -> None:
    door = make_door(kind, credentials=credentials)
    with Client(door) as client:
        with contextlib.suppress(ssl.SSLWantReadError):
            client.tls.do_handshake()
        client.push()
        wait_until(lambda: door.server.connections == 1)
        begun = time.monotonic()
        door.stop(TIMEOUT_S).result(TIMEOUT_S)
        assert time.monotonic() - begun < 5


@pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)
def test_drain(make_door: MakeDoor, kind: str, credentials: ServerCredentials, certificates: Certificates) -> None:
    door = make_door(kind, credentials=credentials)
    with Client(door).greet() as client:
        client.do(client.tls.write, headers(1, f"/{SERVICE}/Wait", "END_HEADERS"))
        client.do(client.tls.write, DataFrame(1, frame_of(b"x"), flags=["END_STREAM"]).serialize())
        wait_until(lambda: door.servicer.count("started") == 1)
        stopping = door.stop(TIMEOUT_S)
        frames = client.read_until(lambda frames: any(isinstance(frame, GoAwayFrame) for frame in frames))
        pings = [frame for frame in frames if isinstance(frame, PingFrame)]
        for ping in pings:
            client.do(client.tls.write, PingFrame(0, ping.opaque_data, flags=["ACK"]).serialize())
        door.release()
        frames = client.read_until(lambda frames: any(is_end_of(frame, 1) for frame in frames))
        assert b"".join(frame.data for frame in frames if isinstance(frame, DataFrame)) == frame_of(b"waited")
        # and a proper goodbye: without close_notify OpenSSL would call it an unexpected end
        assert client.do(client.tls.read, 65536) == b""
        stopping.result(TIMEOUT_S)


@pytest.mark.parametrize("kind", THREADS)
def test_many_cancels(
    make_door: MakeDoor, kind: str, credentials: ServerCredentials, certificates: Certificates
) -> None:
    door = make_door(kind, credentials=credentials)
    channel = door.channel(trust(certificates))
    for _ in range(5):
        calls = [door.call("Wait", channel).future(b"x", timeout=TIMEOUT_S) for _ in range(100)]
        for call in calls:
            call.cancel()
    wait_until(lambda: door.server.calls == 0, "the end of all calls")
    wait_until(lambda: door.servicer.count("cancelled") == door.servicer.count("started"))
    door.check_next_call(channel)


@pytest.mark.parametrize("kind", NATIVE)
def test_a_client_that_says_goodbye_is_closed(
    make_door: MakeDoor, kind: str, credentials: ServerCredentials, certificates: Certificates
) -> None:
    door = make_door(kind, credentials=credentials)
    with Client(door).greet() as client:
        assert client.ask("Echo", b"before") == b"before"
        with contextlib.suppress(ssl.SSLError, EOFError):
            client.do(client.tls.unwrap)
        client.push()
        wait_until(lambda: door.server.connections == 0)


# --------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("kind", NATIVE)
def test_old_versions(make_door: MakeDoor, kind: str, credentials: ServerCredentials) -> None:
    door = make_door(kind, credentials=credentials)
    context = make_context("h2")
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with Client(door, context) as client, pytest.raises((ssl.SSLError, EOFError, ConnectionError)) as caught:
        client.do(client.tls.do_handshake)
    if kind in THREADS:
        assert "PROTOCOL_VERSION" in str(caught.value)
    wait_until(lambda: door.server.connections == 0)


@pytest.mark.parametrize("kind", THREADS)
def test_tls_1_2(make_door: MakeDoor, kind: str, credentials: ServerCredentials) -> None:
    """Works, but not with the suites that HTTP/2 forbids (RFC 9113, appendix A)."""
    door = make_door(kind, credentials=credentials)
    context = make_context("h2")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with Client(door, context).greet() as client:
        assert client.tls.version() == "TLSv1.2"
        assert client.ask("Echo", bytes(10_000)) == bytes(10_000)
    for forbidden in ("ECDHE-RSA-AES128-SHA256", "AES128-GCM-SHA256", "ECDHE-RSA-AES128-SHA"):
        context.set_ciphers(f"{forbidden}:@SECLEVEL=0")
        with Client(door, context) as client, pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
            client.do(client.tls.do_handshake)


@pytest.mark.parametrize("kind", THREADS)
def test_who_speaks_something_else_is_told(make_door: MakeDoor, kind: str, credentials: ServerCredentials) -> None:
    """RFC 7301, 3.2. A client that names no protocol is let in and shown the door, as on the loop."""
    door = make_door(kind, credentials=credentials)
    for protocols in (["http/1.1"], ["h3", "h2c", "x" * 200]):
        with (
            Client(door, make_context(*protocols)) as client,
            pytest.raises(ssl.SSLError, match=r"(?i)application.protocol"),
        ):
            client.do(client.tls.do_handshake)
    with Client(door, make_context("x" * 200, "http/1.1", "h2")).greet() as client:
        assert client.tls.selected_alpn_protocol() == "h2"
        assert client.ask("Echo", b"x") == b"x"
    with Client(door, make_context()) as client:
        client.do(client.tls.do_handshake)
        assert client.do(client.tls.read, 100) == b""
    wait_until(lambda: door.server.connections == 0)


@pytest.mark.parametrize("kind", THREADS)
def test_the_wrong_port(
    make_door: MakeDoor, kind: str, credentials: ServerCredentials, certificates: Certificates
) -> None:
    """Plain text to a port with TLS, and the other way round."""
    secure, plain = make_door(kind, credentials=credentials), make_door(kind)
    with socket.create_connection(("127.0.0.1", secure.port), TIMEOUT_S) as raw:
        raw.sendall(GREETING)
        with contextlib.suppress(ConnectionError):
            while raw.recv(65536):
                pass
    with Client(plain) as client, pytest.raises((ssl.SSLError, EOFError, ConnectionError)):
        client.do(client.tls.do_handshake)
    for door in (secure, plain):
        wait_until(lambda door=door: door.server.connections == 0)  # type: ignore[misc]
    plain.check_next_call()
    secure.check_next_call(secure.channel(trust(certificates)))


@pytest.mark.parametrize("kind", NATIVE)
def test_records_that_were_tampered_with(
    make_door: MakeDoor, kind: str, credentials: ServerCredentials, certificates: Certificates
) -> None:
    door = make_door(kind, credentials=credentials)
    with Client(door).greet() as client:
        assert client.ask("Echo", b"x") == b"x"
        client.tls.write(headers(3, f"/{SERVICE}/Wait", "END_HEADERS", "END_STREAM"))
        record = bytearray(client.outgoing.read())
        record[-1] ^= 1
        client.socket.sendall(record)
        assert client.is_closed_soon()
    assert door.servicer.count("started") == 0
    door.check_next_call(door.channel(trust(certificates)))


@pytest.mark.parametrize("kind", THREADS)
def test_renegotiation_is_refused(make_door: MakeDoor, kind: str, credentials: ServerCredentials) -> None:
    door = make_door(kind, credentials=credentials)
    target = ["-connect", f"127.0.0.1:{door.port}", "-alpn", "h2", "-tls1_2"]
    done = subprocess.run(["openssl", "s_client", *target], input=b"R\n", capture_output=True, timeout=TIMEOUT_S)
    assert b"no renegotiation" in done.stderr
    assert b"Compression: NONE" in done.stdout
    wait_until(lambda: door.server.connections == 0)


@pytest.mark.parametrize("kind", THREADS)
def test_new_keys(make_door: MakeDoor, kind: str, credentials: ServerCredentials) -> None:
    """`K` makes s_client change its keys and ask for new ones: what comes then is understood and answered."""
    door = make_door(kind, credentials=credentials)
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{door.port}", "-alpn", "h2", "-tls1_3"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as client:
        assert client.stdin and client.stdout and client.stderr
        try:
            client.stdin.write(GREETING)
            client.stdin.flush()
            received = b""
            for number in range(1, 20):
                # from the first answer on, each line is read alone: s_client takes its commands from such
                while received.count(SETTINGS_ACK) < number:
                    more = os.read(client.stdout.fileno(), 65536)
                    assert more, "the connection was closed"
                    received += more
                client.stdin.write(b"K\n")
                client.stdin.flush()
                while b"KEYUPDATE" not in (line := client.stderr.readline()):
                    assert line, "s_client has ended"
                client.stdin.write(SettingsFrame(0).serialize())
                client.stdin.flush()
        finally:
            client.kill()
    wait_until(lambda: door.server.connections == 0)


# ------------------------------------------------------------------------------------------------- bytes in portions
@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_byte_by_byte(make_door: MakeDoor, kind: str, version: ssl.TLSVersion, credentials: ServerCredentials) -> None:
    door = make_door(kind, credentials=credentials)
    context = make_context("h2")
    context.minimum_version = context.maximum_version = version
    with Client(door, context, pace=1).greet() as client:
        for stream_id in (1, 3, 5):
            assert client.ask("Echo", b"%d" % stream_id * 50, stream_id) == b"%d" % stream_id * 50


@pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)
def test_many_records_at_once(make_door: MakeDoor, kind: str, credentials: ServerCredentials) -> None:
    """Greeting and calls right behind the handshake's last message, one record per byte: nothing stays inside."""
    door = make_door(kind, credentials=credentials)
    with Client(door) as client:
        with contextlib.suppress(ssl.SSLWantReadError):
            client.tls.do_handshake()
        client.push()
        while True:
            client.incoming.write(client.socket.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                client.tls.do_handshake()
                break
        request = GREETING + headers(1, f"/{SERVICE}/Echo", "END_HEADERS")
        for byte in request + DataFrame(1, frame_of(b"tiny records"), flags=["END_STREAM"]).serialize():
            client.tls.write(bytes([byte]))
        client.push()
        frames = client.read_until(lambda frames: any(is_end_of(frame, 1) for frame in frames))
        assert b"".join(frame.data for frame in frames if isinstance(frame, DataFrame)) == frame_of(b"tiny records")


@pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)
def test_large_messages_both_ways(
    make_door: MakeDoor, kind: str, credentials: ServerCredentials, certificates: Certificates
) -> None:
    door = make_door(kind, credentials=credentials)
    channels = [door.channel(trust(certificates), max_receive_message_length=-1) for _ in range(4)]
    contents = [os.urandom(1_000_003) * (index + 1) for index in range(8)]
    calls = [
        door.call("Echo", channels[index % 4]).future(content, timeout=TIMEOUT_S)
        for index, content in enumerate(contents)
    ]
    for call, content in zip(calls, contents, strict=True):
        assert call.result() == content


@pytest.mark.parametrize("kind", THREADS)
def test_a_client_that_reads_late(make_door: MakeDoor, kind: str, credentials: ServerCredentials) -> None:
    """The socket is full in the middle of a record: what was sealed is sent later, as it is, before all else."""
    door = make_door(kind, credentials=credentials)
    content = os.urandom(7_000_000)
    with Client(door).greet() as client:
        settings = SettingsFrame(0, {SettingsFrame.INITIAL_WINDOW_SIZE: 1 << 30}).serialize()
        window = WindowUpdateFrame(0, 1 << 30).serialize()
        client.do(client.tls.write, settings + window + SettingsFrame(0, flags=["ACK"]).serialize())
        client.read_until(lambda frames: len(frames) >= 2)
        client.tls.write(headers(1, f"/{SERVICE}/Echo", "END_HEADERS"))
        data = frame_of(content)
        for at in range(0, len(data), 16384):
            flags = ["END_STREAM"] if at + 16384 >= len(data) else []
            client.tls.write(DataFrame(1, data[at : at + 16384], flags=flags).serialize())
        client.push()
        # the answer fills both sockets' buffers, and waits
        poll = select.poll()
        poll.register(client.socket, select.POLLIN)
        assert poll.poll(TIMEOUT_S * 1000)
        time.sleep(0.2)
        frames = client.read_until(lambda frames: bool(frames) and is_end_of(frames[-1], 1))
        assert b"".join(frame.data for frame in frames if isinstance(frame, DataFrame)) == data


# ------------------------------------------------------------------------------------------------------------ identity
def info_of(door: Door, channel: grpc.Channel) -> dict[str, Any]:
    info: dict[str, Any] = ast.literal_eval(door.call("Info", channel)(b"", timeout=TIMEOUT_S).decode())
    return info


def test_the_same_identity_at_every_door(
    make_door: MakeDoor, mutual: ServerCredentials, certificates: Certificates, tmp_path: Path
) -> None:
    """Names of all kinds: what our doors tell a servicer of them is what grpc.aio tells."""
    names = "DNS:a.example,DNS:*.b.example,IP:10.0.0.1,IP:fe80::1,email:a@b.c,URI:spiffe://td/x"
    (tmp_path / "ext").write_text(f"subjectAltName={names}\n")
    for name in ("ca.crt", "ca.key"):
        (tmp_path / name).write_bytes(certificates(name))
    request = "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key -out csr -subj /O=org/CN=one/CN=two"
    sign = "x509 -req -in csr -CA ca.crt -CAkey ca.key -CAcreateserial -out crt -days 2 -extfile ext"
    for command in (request, sign):
        subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    known = grpc.ssl_channel_credentials(
        certificates("ca.crt"), (tmp_path / "key").read_bytes(), (tmp_path / "crt").read_bytes()
    )
    infos = {
        kind: info_of(door := make_door(kind, credentials=mutual), door.channel(known))
        for kind in (*NATIVE_AND_TWO_THREADS, "grpcio")
    }
    theirs = infos.pop("grpcio")
    assert theirs["auth"]["x509_common_name"] == [b"one"]
    for ours in infos.values():
        for key in ours["auth"]:
            assert ours["auth"][key] == theirs["auth"][key], key
        assert len(ours["auth"]) == 10
        assert (ours["identities"], ours["key"]) == (theirs["identities"], theirs["key"])


@pytest.mark.parametrize("kind", THREADS)
def test_a_resumed_session_keeps_its_identity(
    make_door: MakeDoor, kind: str, mutual: ServerCredentials, certificates: Certificates, tmp_path: Path
) -> None:
    """The ticket of one thread is good at the other; a stranger gets none."""
    door = make_door(kind, credentials=mutual)
    context = make_context("h2")
    (tmp_path / "pem").write_bytes(certificates("client.crt") + certificates("client.key"))
    context.load_cert_chain(tmp_path / "pem")
    with Client(door, context).greet() as client:
        first = ast.literal_eval(client.ask("Info", b"").decode())
        session = client.tls.session
    assert first["auth"]["ssl_session_reused"] == [b"false"]
    assert session is not None and session.has_ticket
    assert 0 < session.ticket_lifetime_hint <= 3600
    for _ in range(4):
        with Client(door, context, session=session).greet() as client:
            again = ast.literal_eval(client.ask("Info", b"").decode())
            assert client.tls.session_reused
        assert again["auth"]["ssl_session_reused"] == [b"true"]
        assert again["identities"] == [b"client.example"]
        assert again["auth"]["x509_pem_cert"] == first["auth"]["x509_pem_cert"]


def test_an_identity_outlives_its_connection(
    make_door: MakeDoor, mutual: ServerCredentials, certificates: Certificates
) -> None:
    door = make_door("native-asyncio-1", credentials=mutual)
    known = grpc.ssl_channel_credentials(certificates("ca.crt"), certificates("client.key"), certificates("client.crt"))
    channel = door.channel(known)
    call = door.call("Wait", channel).future(b"x", timeout=TIMEOUT_S)
    wait_until(lambda: door.servicer.count("started") == 1)
    channel.close()
    wait_until(lambda: door.server.connections == 0)
    assert call.done()
    (context,) = door.servicer.contexts
    assert context.peer_identities() == [b"client.example"]


# ------------------------------------------------------------------------------------------------------- who serves it
@pytest.mark.parametrize("kind", THREADS)
def test_ports_with_tls_belong_to_the_threads(
    make_door: MakeDoor, kind: str, credentials: ServerCredentials, certificates: Certificates, instance: Instance
) -> None:
    """The loop is stuck; the fast path over TLS does not notice."""
    door = make_door(kind, credentials=credentials, router=route_to(instance.scheduler))
    assert {type(driver) for driver in door.server._drivers} == {IoThread}
    channel = door.channel(trust(certificates))
    door.check_next_call(channel)
    with door.stuck_loop():
        infer = channel.unary_unary(FAST_PATH)
        for value in range(100):
            assert values_of(infer(message(value), timeout=TIMEOUT_S)) == [2.0 * value]
        other = door.channel(trust(certificates)).unary_unary(FAST_PATH)  # a handshake needs nobody else either
        assert values_of(other(message(7), timeout=TIMEOUT_S)) == [14.0]


def test_many_clients_on_two_threads(
    make_door: MakeDoor, credentials: ServerCredentials, certificates: Certificates, instance: Instance
) -> None:
    door = make_door("native-uvloop-2", credentials=credentials, router=route_to(instance.scheduler))
    channels = [door.channel(trust(certificates)) for _ in range(60)]

    def ask(index: int) -> None:
        infer = channels[index % 60].unary_unary(FAST_PATH)
        calls = [infer.future(message(index * 100 + n), timeout=TIMEOUT_S) for n in range(10)]
        assert [values_of(call.result()) for call in calls] == [[2.0 * (index * 100 + n)] for n in range(10)]
        assert door.call("Echo", channels[index % 60])(b"%d" % index, timeout=TIMEOUT_S) == b"%d" % index

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(180)))
    shares = [driver.connections for driver in door.server._drivers]
    assert sum(shares) == 60 and min(shares) > 5, shares


def test_without_openssl_the_loop_carries_it(
    make_door: MakeDoor, mutual: ServerCredentials, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "TlsContext", None)
    monkeypatch.setattr(_core, "read_names", None)
    door = make_door("native-asyncio-1", credentials=mutual)
    assert IoThread not in {type(driver) for driver in door.server._drivers}
    known = grpc.ssl_channel_credentials(certificates("ca.crt"), certificates("client.key"), certificates("client.crt"))
    info = info_of(door, door.channel(known))
    assert info["auth"]["x509_common_name"] == [b"somebody"]
    assert (info["key"], info["identities"]) == ("x509_subject_alternative_name", [b"client.example"])
    assert info["auth"]["peer_dns"] == [b"client.example"]


# --------------------------------------------------------------------------------------------------------- credentials
def test_a_chain_of_certificates(make_door: MakeDoor, certificates: Certificates, tmp_path: Path) -> None:
    """The client knows the root alone; the server sends what lies between."""
    for name in ("ca.crt", "ca.key"):
        (tmp_path / name).write_bytes(certificates(name))
    (tmp_path / "middle.ext").write_text("basicConstraints=critical,CA:TRUE\n")
    (tmp_path / "leaf.ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name, issuer in (("middle", "ca"), ("leaf", "middle")):
        key = f"req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}"
        sign = f"x509 -req -in {name}.csr -CA {issuer}.crt -CAkey {issuer}.key -CAcreateserial -out {name}.crt -days 2"
        for command in (key, f"{sign} -extfile {name}.ext"):
            subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    read = {name: (tmp_path / name).read_bytes() for name in ("leaf.key", "leaf.crt", "middle.crt")}
    whole = ServerCredentials(read["leaf.key"], read["leaf.crt"] + b"\nsome words\n" + read["middle.crt"])
    door = make_door("native-asyncio-1", credentials=whole)
    door.check_next_call(door.channel(trust(certificates)))
    broken = make_door("native-asyncio-1", credentials=ServerCredentials(read["leaf.key"], read["leaf.crt"]))
    with pytest.raises(grpc.RpcError):
        broken.call("Echo", broken.channel(trust(certificates)))(b"x", timeout=TIMEOUT_S)


def test_credentials_that_cannot_be_used(certificates: Certificates, tmp_path: Path) -> None:
    key, chain = certificates("server.key"), certificates("server.crt")
    (tmp_path / "key").write_bytes(key)
    locked = subprocess.run(
        ["openssl", "rsa", "-in", tmp_path / "key", "-aes128", "-passout", "pass:secret"],
        check=True,
        capture_output=True,
    ).stdout
    cases = [
        (certificates("client.key"), chain, None, "private key"),
        (locked, chain, None, "private key"),  # and nobody is asked for a password
        (b"", chain, None, "private key"),
        (key, b"", None, "certificate chain"),
        (key, key, None, "certificate chain"),
        (key, chain[:-40], None, "certificate chain"),
        (key, chain, b"nothing", "root certificates"),
    ]
    for private_key, certificate_chain, roots, what in cases:
        with pytest.raises(ValueError, match=f"not usable PEM: {what}: ") as caught:
            ServerCredentials(private_key, certificate_chain, roots).make_tls_context()
        assert "unknown" not in str(caught.value)
    with pytest.raises(ValueError, match=r"the certificate chain has \d+ bytes; expected at most"):
        ServerCredentials(key, chain * 30).make_tls_context()
    with pytest.raises(ValueError, match="no certificate in DER"):
        _core.read_names(b"\x30\x03abc")


def test_a_locked_key_is_refused_without_a_question(tmp_path: Path) -> None:
    """Whoever renews a certificate with a key that has a password must not stop a server with a terminal."""
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -days 2 -subj /CN=localhost -passout pass:secret"
    subprocess.run(
        ["openssl", *make.split(), "-keyout", "key", "-out", "crt"], check=True, cwd=tmp_path, capture_output=True
    )
    code = """
from pathlib import Path
from aiorch_server.frontends.grpc import ServerCredentials
try:
    ServerCredentials(Path("key").read_bytes(), Path("crt").read_bytes()).make_ssl_context()
except ValueError as error:
    print("refused", error)
"""
    # Without a terminal OpenSSL asks its standard input.
    asked = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with asked:
        try:
            asked.wait(TIMEOUT_S)
        finally:
            asked.kill()
        assert asked.stdout is not None and asked.stdout.read().startswith(b"refused")


# ---------------------------------------------------------------------------------------------------------------- leaks
def test_two_thousand_connections_leave_nothing(
    make_door: MakeDoor, mutual: ServerCredentials, certificates: Certificates, tmp_path: Path
) -> None:
    door = make_door("native-uvloop-2", credentials=mutual)
    (tmp_path / "pem").write_bytes(certificates("client.crt") + certificates("client.key"))
    context = make_context("h2")
    context.load_cert_chain(tmp_path / "pem")
    stranger = make_context("h2")
    process = psutil.Process()

    def come_and_go(count: int) -> None:
        session = None
        for index in range(count):
            client = Client(door, context, session=session) if index % 10 else Client(door, stranger)
            with client, contextlib.suppress(ssl.SSLError, EOFError, ConnectionError):
                client.greet()
                if index % 3 == 0:
                    client.ask("Echo", b"x")
                    session = client.tls.session
                if index % 4 == 0:
                    client.do(client.tls.unwrap)
        wait_until(lambda: door.server.connections == 0)
        gc.collect()

    come_and_go(500)
    descriptors, memory = count_descriptors(), process.memory_info().rss
    come_and_go(1500)
    assert count_descriptors() <= descriptors
    assert process.memory_info().rss - memory < 3 << 20
