"""Doors with real clients: the native one on asyncio, on uvloop and on I/O threads; and grpcio's."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest
import uvloop
from patience import PATIENCE

from aiorch_server.frontends.grpc import (
    NativeGrpcServer,
    ServerCredentials,
    create_grpcio_server,
    is_native_available,
    make_grpcio_credentials,
)

TIMEOUT_S = 20.0 * PATIENCE
SERVICE = "door.Test"
#: native-LOOP-N: N I/O threads, or none: the loop serves the sockets.
NATIVE = ["native-asyncio-0", "native-uvloop-0", "native-asyncio-1"]
NATIVE_AND_TWO_THREADS = [*NATIVE, "native-uvloop-2"]


def wait_until(is_true: Callable[[], Any], what: str = "the state") -> None:
    """Polls with a deadline."""
    end = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < end, f"{what} was not reached"
        time.sleep(0.002)


def wait_until_still(read: Callable[[], int]) -> int:
    """Polls until the value has not changed for a while, with a deadline; gives it."""
    end = time.monotonic() + TIMEOUT_S
    value, since = read(), time.monotonic()
    while time.monotonic() - since < 0.3:
        assert time.monotonic() < end, "the value never stands still"
        time.sleep(0.01)
        if (now := read()) != value:
            value, since = now, time.monotonic()
    return value


def make_rich_status() -> Any:
    """A google.rpc.Status with details of two types, https://cloud.google.com/apis/design/errors."""
    from google.protobuf import any_pb2, duration_pb2
    from google.rpc import error_details_pb2, status_pb2

    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="inputs[0].shape", description="expected [-1, 4], found [1, 3] ... é")
    retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=3))
    status = status_pb2.Status(code=3, message="the request is wrong: 100% ... é")
    for detail in (bad, retry):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


class Servicer:
    """Handlers of all kinds; what the tests wait for is counted under ``seen``."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self.release: asyncio.Event | None = None
        self.contexts: list[Any] = []

    def note(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1

    def count(self, what: str) -> int:
        return self.seen.get(what, 0)

    async def wait(self) -> None:
        """Until released; a cancellation is noted."""
        self.note("started")
        if self.release is None:
            self.release = asyncio.Event()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.note("cancelled")
            raise

    async def Echo(self, request: bytes, context: Any) -> bytes:
        return request

    async def Wait(self, request: bytes, context: Any) -> bytes:
        context.add_done_callback(lambda _: self.note("done"))
        self.contexts.append(context)
        await self.wait()
        return b"waited"

    async def WaitStream(self, request: bytes, context: Any) -> Any:
        yield b"first"
        await self.wait()
        yield b"second"

    async def Stubborn(self, request: bytes, context: Any) -> bytes:
        try:
            await self.wait()
        except asyncio.CancelledError:
            return b"too late"
        return b"in time"

    async def Abort(self, request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, request.decode(), (("why", "a"), ("why-bin", b"\xff")))

    async def AbortStatus(self, request: bytes, context: Any) -> bytes:
        class Status(grpc.Status):  # type: ignore[misc]
            code = grpc.StatusCode.DATA_LOSS
            details = "as one object"
            trailing_metadata = (("k", "v"),)

        await context.abort_with_status(Status())
        return b""

    async def SetCode(self, request: bytes, context: Any) -> bytes:
        context.set_code(grpc.StatusCode.NOT_FOUND)
        context.set_details("not here")
        assert context.code() is grpc.StatusCode.NOT_FOUND and context.details() == "not here"
        return b"dropped"

    async def Raise(self, request: bytes, context: Any) -> bytes:
        raise KeyError(request.decode())

    async def Metadata(self, request: bytes, context: Any) -> bytes:
        await context.send_initial_metadata((("first", "1"), ("first-bin", b"\x00\x01\xfe")))
        pairs = [tuple(pair) for pair in context.invocation_metadata()]
        context.set_trailing_metadata((*[(k, v) for k, v in pairs if k.startswith("x")], ("last", "2")))
        assert context.trailing_metadata()
        return repr(pairs).encode()

    async def BadMetadata(self, request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata((("Upper Case", "x"),))
        return b""

    async def Odd(self, request: bytes, context: Any) -> bytes:
        """Servicers that do what the interface does not allow."""
        match request:
            case b"code":
                context.set_code(99)
            case b"no code":
                context.set_code("NOT_FOUND")
            case b"metadata":
                context.set_trailing_metadata(5)
            case b"details":
                context.set_code(grpc.StatusCode.ABORTED)
                context.set_details(ValueError("no text \ud800"))
            case b"abort with OK":
                await context.abort(grpc.StatusCode.OK, "fine")
            case b"callback":
                context.add_done_callback(lambda _: 1 / 0)
            case b"twice":
                await context.send_initial_metadata(())
                await context.send_initial_metadata(())
            case b"type":
                return 5  # type: ignore[return-value]
        return b"odd"

    async def Info(self, request: bytes, context: Any) -> bytes:
        info = {
            "peer": context.peer(),
            "remaining": context.time_remaining(),
            "auth": {key: list(value) for key, value in context.auth_context().items()},
            "identities": list(context.peer_identities() or ()),
            "key": context.peer_identity_key(),
            "cancelled": context.cancelled(),
        }
        context.set_compression(grpc.Compression.Gzip)
        context.disable_next_message_compression()
        return repr(info).encode()

    async def RichAbort(self, request: bytes, context: Any) -> bytes:
        from grpc_status import rpc_status

        status = rpc_status.to_status(make_rich_status())
        if request == b"trailing":
            context.set_code(status.code)
            context.set_details(status.details)
            context.set_trailing_metadata(status.trailing_metadata)
            return b""
        await context.abort_with_status(status)
        return b""

    def SyncRichAbort(self, request: bytes, context: Any) -> bytes:
        from grpc_status import rpc_status

        context.abort_with_status(rpc_status.to_status(make_rich_status()))
        return b""

    async def Pack(self, requests: Any, context: Any) -> Any:
        """Echoes; the first message names the algorithm, and ``plain`` in front sends one as it is."""
        if (name := await context.read()) != b"default":
            context.set_compression(getattr(grpc.Compression, name.decode()))
        async for request in requests:
            if request.startswith(b"plain"):
                context.disable_next_message_compression()
            yield request

    def SyncPack(self, request: bytes, context: Any) -> bytes:
        context.set_compression(grpc.Compression.Gzip)
        return request

    async def Count(self, request: bytes, context: Any) -> Any:
        for index in range(int(request)):
            yield b"%d" % index

    async def CountWrite(self, request: bytes, context: Any) -> None:
        for index in range(int(request)):
            await context.write(b"%d" % index)

    async def CountThenRaise(self, request: bytes, context: Any) -> Any:
        yield b"0"
        raise ValueError("after one")

    async def Flood(self, request: bytes, context: Any) -> Any:
        for _ in range(int(request)):
            yield bytes(100_000)
            self.note("written")

    async def Sum(self, requests: Any, context: Any) -> bytes:
        return b"%d" % sum([int(request) async for request in requests])

    async def SumRead(self, requests: Any, context: Any) -> bytes:
        total = 0
        while (request := await context.read()) is not grpc.aio.EOF:
            total += int(request)
        return b"%d" % total

    async def SlowSum(self, requests: Any, context: Any) -> bytes:
        await self.wait()
        return b"%d" % sum([len(request) async for request in requests])

    async def Chat(self, requests: Any, context: Any) -> Any:
        async for request in requests:
            yield b"re: " + request

    async def WaitChat(self, requests: Any, context: Any) -> Any:
        async for request in requests:
            yield request
            await self.wait()

    def SyncEcho(self, request: bytes, context: Any) -> bytes:
        assert threading.current_thread() is not threading.main_thread()
        if request == b"abort":
            context.abort(grpc.StatusCode.OUT_OF_RANGE, "from a thread")
        if request == b"raise":
            raise KeyError("thread")
        context.set_trailing_metadata((("sync", "yes"),))
        return request

    def SyncCount(self, request: bytes, context: Any) -> Iterator[bytes]:
        for index in range(int(request)):
            yield b"%d" % index

    def SyncSum(self, requests: Iterator[bytes], context: Any) -> bytes:
        return b"%d" % sum(int(request) for request in requests)

    def SyncChat(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for request in requests:
            yield b"re: " + request

    KINDS: ClassVar = {
        "uu": (
            *("Echo", "Wait", "Stubborn", "Abort", "AbortStatus", "SetCode", "Raise", "Metadata", "BadMetadata"),
            *("Info", "SyncEcho", "Odd", "RichAbort", "SyncRichAbort", "SyncPack"),
        ),
        "us": ("WaitStream", "Count", "CountWrite", "CountThenRaise", "Flood", "SyncCount"),
        "su": ("Sum", "SumRead", "SlowSum", "SyncSum"),
        "ss": ("Chat", "WaitChat", "SyncChat", "Pack"),
    }

    def handlers(self) -> dict[str, Any]:
        make = {
            "uu": grpc.unary_unary_rpc_method_handler,
            "us": grpc.unary_stream_rpc_method_handler,
            "su": grpc.stream_unary_rpc_method_handler,
            "ss": grpc.stream_stream_rpc_method_handler,
        }
        return {name: make[kind](getattr(self, name)) for kind, names in self.KINDS.items() for name in names}


class Door:
    """A running server, its servicer, and channels to it; everything is closed at the end of the test."""

    def __init__(self, kind: str, address: str = "127.0.0.1:0", credentials: Any = None, **options: Any) -> None:
        assert is_native_available(), "the compiled door was not built"
        self.kind = kind
        self.servicer = Servicer()
        self.loop = uvloop.new_event_loop() if "uvloop" in kind else asyncio.new_event_loop()
        self.problems: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))
        self._thread = threading.Thread(target=self._run_loop, name=kind)
        self._thread.start()
        self._channels: list[grpc.Channel] = []
        self.address = address
        self.server: Any = None
        self.run(self._start(address, credentials, options))

    @property
    def is_native(self) -> bool:
        return self.kind.startswith("native")

    async def _start(self, address: str, credentials: Any, options: dict[str, Any]) -> None:
        register = options.pop("register", None)
        if self.is_native:
            self.server = NativeGrpcServer(io_threads=int(self.kind.rpartition("-")[2]), **options)
        else:
            self.server = create_grpcio_server(**options)
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, self.servicer.handlers()),))
        if register is not None:
            result = register(self.server)
            if asyncio.iscoroutine(result):
                await result
        if credentials is None:
            self.port = self.server.add_insecure_port(address)
        else:
            ours = credentials if self.is_native else make_grpcio_credentials(credentials)
            self.port = self.server.add_secure_port(address, ours)
        self.target = address if address.startswith("unix") else f"{address.rpartition(':')[0]}:{self.port}"
        await self.server.start()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def run(self, work: Coroutine[Any, Any, Any], timeout: float = TIMEOUT_S) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def stop(self, grace: float | None = None) -> Any:
        """Begins to stop; gives a concurrent future."""
        return asyncio.run_coroutine_threadsafe(self.server.stop(grace), self.loop)

    def release(self) -> None:
        def set_event() -> None:
            if self.servicer.release is None:
                self.servicer.release = asyncio.Event()
            self.servicer.release.set()

        self.loop.call_soon_threadsafe(set_event)

    @contextmanager
    def stuck_loop(self) -> Iterator[None]:
        """The loop stands still inside the block: from the first line to the last."""
        is_stuck, release = threading.Event(), threading.Event()

        def stand_still() -> None:
            is_stuck.set()
            release.wait(TIMEOUT_S)

        self.loop.call_soon_threadsafe(stand_still)
        assert is_stuck.wait(TIMEOUT_S)
        try:
            yield
        finally:
            release.set()

    def channel(self, credentials: Any = None, **options: Any) -> grpc.Channel:
        arguments = [(f"grpc.{name}", value) for name, value in options.items()]
        arguments.append(("grpc.use_local_subchannel_pool", 1))
        if credentials is None:
            channel = grpc.insecure_channel(self.target, arguments)
        else:
            channel = grpc.secure_channel(self.target, credentials, arguments)
        self._channels.append(channel)
        return channel

    def call(self, method: str, channel: grpc.Channel | None = None) -> Any:
        """A callable of the method's kind, on a channel of its own by default."""
        kind = next(kind for kind, names in Servicer.KINDS.items() if method in names)
        channel = channel or self.channel()
        make = {
            "uu": channel.unary_unary,
            "us": channel.unary_stream,
            "su": channel.stream_unary,
            "ss": channel.stream_stream,
        }[kind]
        return make(f"/{SERVICE}/{method}")

    def check_next_call(self, channel: grpc.Channel | None = None) -> None:
        assert self.call("Echo", channel)(b"still here", timeout=TIMEOUT_S) == b"still here"

    def close(self) -> None:
        for channel in self._channels:
            channel.close()
        self.run(self.server.stop(None))
        assert self.run(self.server.wait_for_termination(TIMEOUT_S)) is False
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        self.loop.close()
        if self.kind == "native-asyncio-0":
            # Python 3.11's loop forgets a connection that it accepts while its server closes, and warns when it is
            # collected.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                gc.collect()
        assert self.problems == []


@pytest.fixture
def make_door() -> Iterator[Callable[..., Door]]:
    doors: list[Door] = []

    def make(*arguments: Any, **options: Any) -> Door:
        doors.append(Door(*arguments, **options))
        return doors[-1]

    yield make
    for door in doors:
        door.close()


@pytest.fixture(params=[*NATIVE, "grpcio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[*NATIVE_AND_TWO_THREADS, "grpcio"])
def kind_or_two(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def door(kind: str, make_door: Callable[..., Door]) -> Door:
    return make_door(kind)


@pytest.fixture(params=NATIVE)
def native_door(request: pytest.FixtureRequest, make_door: Callable[..., Door]) -> Door:
    return make_door(request.param)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """PEM files of an authority, a server, a client, and of a stranger signed by itself."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    def make_request(name: str, subject: str) -> None:
        openssl(*f"req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj {subject}".split())

    for name, subject in (("ca", "/CN=authority"), ("bad", "/CN=stranger")):
        make = f"req -x509 -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.crt -subj {subject} -days 2"
        openssl(*make.split())
    (folder / "server.ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    (folder / "client.ext").write_text("subjectAltName=DNS:client.example\n")
    for name, subject in (("server", "/CN=localhost"), ("client", "/CN=somebody")):
        make_request(name, subject)
        sign = f"x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out {name}.crt -days 2"
        openssl(*sign.split(), "-extfile", f"{name}.ext")
    return lambda name: Path(folder / name).read_bytes()


@pytest.fixture(scope="session")
def credentials(certificates: Callable[[str], bytes]) -> ServerCredentials:
    return ServerCredentials(certificates("server.key"), certificates("server.crt"))
