"""Certificates are replaced while the server runs: through every gRPC door, never by something unusable."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from aiorch_proto.v2.service import InferenceStub
from patience import PATIENCE

from aiorch_server.app import Application
from aiorch_server.frontends.grpc import ServerCredentials

from .test_grpc_settings import TRANSPORTS, configure, make_request

TIMEOUT_S = 20.0 * PATIENCE


@pytest.fixture(scope="session")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """Keys and certificates, each signed by itself: two of a server, two of clients."""
    folder = tmp_path_factory.mktemp("pem")
    for name in ("first", "second", "old-client", "new-client"):
        make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
        names = f"-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout {name}.key -out {name}.crt"
        subprocess.run(["openssl", *make.split(), *names.split()], cwd=folder, check=True, capture_output=True)
    return lambda name: (folder / name).read_bytes()


def replace(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


class Site:
    """A server whose certificate lies in ``folder``; for one running loop."""

    def __init__(self, tmp_path: Path, transport: str, pem: Callable[[str], bytes], *, clients: str = "") -> None:
        self.folder, self.pem = tmp_path / "tls", pem
        self.folder.mkdir()
        tls = {"certificate": self.folder / "server.crt", "key": self.folder / "server.key", "reload_secs": 0.05}
        self.put("first")
        if clients:
            self.trust(clients)
            tls |= {"root": self.folder / "root.crt", "require_client_auth": True}
        self.app = Application(configure(tmp_path / "models", transport, tls=tls))

    def put(self, name: str) -> None:
        replace(self.folder / "server.key", self.pem(f"{name}.key"))
        replace(self.folder / "server.crt", self.pem(f"{name}.crt"))

    def trust(self, name: str) -> None:
        replace(self.folder / "root.crt", self.pem(f"{name}.crt"))

    def channel(self, server: str, client: str = "") -> grpc.aio.Channel:
        own = (self.pem(f"{client}.key"), self.pem(f"{client}.crt")) if client else (None, None)
        credentials = grpc.ssl_channel_credentials(self.pem(f"{server}.crt"), *own)
        options = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.secure_channel(f"127.0.0.1:{self.app.grpc_port}", credentials, options)

    async def ask(self, channel: grpc.aio.Channel, timeout: float = TIMEOUT_S) -> None:
        answer = await InferenceStub(channel).ModelInfer(make_request(np.array([7])), timeout=timeout)
        assert answer.raw_output_contents == [np.int32(7).tobytes()]

    async def wait_for(self, name: str) -> None:
        """Until new connections are shown this certificate."""
        wanted = ssl.PEM_cert_to_DER_cert(self.pem(f"{name}.crt").decode())
        end = time.monotonic() + TIMEOUT_S
        while await asyncio.to_thread(self.look) != wanted:
            assert time.monotonic() < end, f"{name} is not shown"

    def look(self) -> bytes | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        raw = socket.create_connection(("127.0.0.1", self.app.grpc_port or 0), TIMEOUT_S)
        with raw, context.wrap_socket(raw) as wrapped:
            return wrapped.getpeercert(binary_form=True)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_new_connections_get_the_new_certificate_and_open_ones_stay(
    tmp_path: Path, transport: str, pem: Callable[[str], bytes]
) -> None:
    site = Site(tmp_path, transport, pem)
    async with site.app, site.channel("first") as before:
        await site.ask(before)
        call = before.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")()
        await site.wait_for("first")
        site.put("second")
        await site.wait_for("second")
        await site.ask(before)  # its connection is still the same: another one would not be trusted
        call.cancel()
        async with site.channel("second") as after, site.channel("first") as distrusting:
            await site.ask(after)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await site.ask(distrusting, timeout=5.0)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("bad", ["garbage", "another key", "gone"])
async def test_what_cannot_be_used_is_named_and_the_old_stays(
    tmp_path: Path, transport: str, bad: str, pem: Callable[[str], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(tmp_path, transport, pem)
    caplog.set_level(logging.ERROR, "aiorch_server")
    async with site.app:
        if bad == "garbage":
            replace(site.folder / "server.crt", b"-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
        elif bad == "another key":
            replace(site.folder / "server.key", pem("second.key"))
        else:
            (site.folder / "server.crt").unlink()
        end = time.monotonic() + TIMEOUT_S
        while not caplog.records:
            assert time.monotonic() < end, "nothing is told"
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        (record,) = caplog.records  # told once
        assert "the old ones stay in force" in record.getMessage()
        assert "PRIVATE" not in record.getMessage()
        await site.wait_for("first")
        async with site.channel("first") as channel:
            await site.ask(channel)
        site.put("second")
        await site.wait_for("second")


@pytest.mark.parametrize("kind", ["pipe", "endless"])
async def test_what_is_no_file_ends_no_renewal(
    tmp_path: Path, kind: str, pem: Callable[[str], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    site = Site(tmp_path, "native", pem)
    strange = site.folder / "server.crt"
    async with site.app:
        strange.unlink()
        if kind == "pipe":
            os.mkfifo(strange)
        else:
            strange.symlink_to("/dev/zero")
        end = time.monotonic() + TIMEOUT_S
        while not caplog.records:
            assert time.monotonic() < end, "nothing is told"
            await asyncio.sleep(0.01)
        site.put("second")
        await site.wait_for("second")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_clients_are_checked_against_the_new_authorities(
    tmp_path: Path, transport: str, pem: Callable[[str], bytes]
) -> None:
    site = Site(tmp_path, transport, pem, clients="old-client")
    async with site.app:
        async with site.channel("first", "old-client") as channel:
            await site.ask(channel)
        site.trust("new-client")
        site.put("second")
        end = time.monotonic() + TIMEOUT_S
        while True:
            async with site.channel("second", "new-client") as channel:
                try:
                    await site.ask(channel, timeout=2.0)
                    break
                except grpc.aio.AioRpcError:
                    assert time.monotonic() < end, "the new client is not let in"
        async with site.channel("second", "old-client") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await site.ask(channel, timeout=5.0)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("transport", ["native-0", "native-1"])
async def test_no_session_of_before_is_resumed(tmp_path: Path, transport: str, pem: Callable[[str], bytes]) -> None:
    """Or whose authority is not trusted any more would come back."""
    site = Site(tmp_path, transport, pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2  # the session is there after the handshake
    context.set_alpn_protocols(["h2"])

    def come(session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool | None]:
        raw = socket.create_connection(("127.0.0.1", site.app.grpc_port or 0), TIMEOUT_S)
        with raw, context.wrap_socket(raw, session=session) as wrapped:
            return wrapped.session, wrapped.session_reused

    async with site.app:
        session, _ = await asyncio.to_thread(come, None)
        assert (await asyncio.to_thread(come, session))[1]
        site.put("second")
        await site.wait_for("second")
        assert not (await asyncio.to_thread(come, session))[1]


@pytest.mark.parametrize("transport", ["native-0", "native-1"])
async def test_renewed_again_and_again_among_connections(
    tmp_path: Path, transport: str, pem: Callable[[str], bytes]
) -> None:
    site = Site(tmp_path, transport, pem)
    shown: set[bytes | None] = set()
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            shown.add(site.look())

    async with site.app:
        threads = [asyncio.create_task(asyncio.to_thread(come_and_go)) for _ in range(3)]
        names = ("first", "second")
        for turn in range(60):
            name = names[turn % 2]
            site.app._grpc.renew_credentials(ServerCredentials(pem(f"{name}.key"), pem(f"{name}.crt")))
            await asyncio.sleep(0.001)
        stop.set()
        await asyncio.gather(*threads)
    assert shown == {ssl.PEM_cert_to_DER_cert(pem(f"{name}.crt").decode()) for name in names}
