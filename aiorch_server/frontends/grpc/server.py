"""The native gRPC door: ``grpc.aio.Server``'s surface over the compiled HTTP/2 core, without the package grpc.

``embedded.NativeGrpcServer`` is this door for code that brings grpc along. Calls of ``fast_path`` go from the
socket into the model's queue without Python; all others run here, one task each.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, TypeVar

from aiorch_server import _core
from aiorch_server.errors import Code
from aiorch_server.frontends.grpc.address import bind_sockets, remove_socket_file
from aiorch_server.frontends.grpc.call import run_call
from aiorch_server.frontends.grpc.compression import Compression, ResponseCompression
from aiorch_server.frontends.grpc.context import ServicerContext
from aiorch_server.frontends.grpc.credentials import ServerCredentials, is_tls_compiled, renew_ssl_context
from aiorch_server.frontends.grpc.intercept import chain_interceptors, check_interceptors, is_skipped
from aiorch_server.frontends.grpc.limits import ConnectionLife, ConnectionLimits, ServerLimits, make_ledger, make_rules
from aiorch_server.frontends.grpc.metadata import MalformedMetadata, decode_metadata
from aiorch_server.frontends.unpacking import UnpackBudget

if TYPE_CHECKING:
    from ssl import SSLContext

    import grpc

    from aiorch_server._core import Call, IoThread, NativeServer, Passes, Router, ServerLedger, TlsContext

logger = logging.getLogger(__name__)

#: The one method that the compiled path carries.
FAST_PATH: Final = "/inference.GRPCInferenceService/ModelInfer"
MAX_MESSAGE_BYTES: Final = 64 << 20
_SYNC_THREADS: Final = 8
#: How long cancelled calls may take to send their status, and cancelled servicers to return.
_LAST_WORDS_S: Final = 1.0
_LAST_SERVICERS_S: Final = 5.0


_Driver = TypeVar("_Driver", "NativeServer", "IoThread")


class _HandlerCallDetails(NamedTuple):
    method: str
    invocation_metadata: Any


class _Port(NamedTuple):
    sockets: list[socket.socket]
    is_for_loop: bool
    ssl_context: SSLContext | None = None  # of the loop's
    tls_context: TlsContext | None = None  # of the I/O threads'


def is_native_available() -> bool:
    """Whether the compiled door was built; otherwise only ``create_grpcio_server`` works."""
    return _core.NativeServer is not None


class GrpcDoor:
    """A gRPC server on the running loop.

    ``router`` None sends every call to the registered handlers. ``maximum_concurrent_rpcs`` counts the calls that
    handlers run; those of the fast path are bounded by their queues. Handlers that are plain functions run on
    ``executor`` (a pool of 8 threads if None). Ports are served by ``io_threads`` threads that never need the
    interpreter lock, or, with 0, by the loop; so are ports with TLS where the package was built without OpenSSL. With
    ``reuse_port`` other processes may share the TCP ports (gRPC's ``grpc.so_reuseport``, which is on by default there).
    ``interceptors`` and ``compression`` (an algorithm, or with its least size) are those of ``grpc.aio.server``: the
    first end the fast path unless they declare otherwise (see ``intercept``), the second ends it for clients that take
    packed answers. With ``passes`` calls of the fast path need one of them, all others go to the handlers, which decide
    and add what they allow. ``on_thread`` is called with the system's id of each I/O thread when it has begun; what it
    raises, ``start`` raises. Raises RuntimeError where the compiled door was not built.
    """

    context_class: ClassVar[type[ServicerContext]] = ServicerContext

    def __init__(
        self,
        *,
        router: Router | None = None,
        fast_path: str = FAST_PATH,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        maximum_concurrent_rpcs: int | None = None,
        executor: ThreadPoolExecutor | None = None,
        limits: ConnectionLimits | None = None,
        io_threads: int = 1,
        reuse_port: bool = False,
        life: ConnectionLife | None = None,
        server_limits: ServerLimits | None = None,
        compression: ResponseCompression | int | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] | None = None,
        passes: Passes | None = None,
        on_thread: Callable[[int], object] | None = None,
    ) -> None:
        if not is_native_available():
            raise RuntimeError("the native gRPC door needs libnghttp2 at build time; use --transport grpcio instead")
        if io_threads < 0:
            raise ValueError(f"io_threads is {io_threads}; expected 0 (the loop) or more")
        self._io_threads = io_threads
        self._reuse_port = reuse_port
        self._router = router
        self._passes = passes
        self._on_thread = on_thread
        self._interceptors = check_interceptors(interceptors)
        self._fast_path = fast_path if all(is_skipped(each, fast_path) for each in self._interceptors) else ""
        if not isinstance(compression, ResponseCompression):
            compression = ResponseCompression(compression or Compression.NONE)
        self._compression = compression
        self._life = life or ConnectionLife()
        self._ledger = make_ledger(server_limits or ServerLimits())
        self._max_message_bytes = max_message_bytes
        self._maximum_concurrent_rpcs = maximum_concurrent_rpcs
        self._limits = limits or ConnectionLimits()
        self._unpack_budget = UnpackBudget()
        self._owned_executor = None if executor else ThreadPoolExecutor(_SYNC_THREADS, thread_name_prefix="aiorch-rpc")
        self._executor = executor or self._owned_executor
        self._registered: dict[str, grpc.RpcMethodHandler] = {}
        self._generic: list[grpc.GenericRpcHandler] = []
        self._ports: list[_Port] = []
        self._listeners: list[asyncio.AbstractServer] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._drivers: list[NativeServer | IoThread] = []
        self._is_started = False
        self._shutdown: asyncio.Task[None] | None = None
        self._stop_at: float | None = None
        self._hurry = asyncio.Event()
        self._terminated = asyncio.Event()

    # --------------------------------------------------------------------------------------------- registration

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Handlers that are asked, in order, for methods that nobody registered."""
        for handler in generic_rpc_handlers:
            if not hasattr(handler, "service"):
                raise AttributeError(f"{handler!r} has no method 'service': not a generic RPC handler")
            self._generic.append(handler)

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, grpc.RpcMethodHandler]
    ) -> None:
        """Handlers by method name of one service; they win over generic ones."""
        for method, handler in method_handlers.items():
            self._registered[f"/{service_name}/{method}"] = handler

    def add_insecure_port(self, address: str) -> int:
        """Binds ``address`` without TLS and gives the port; see ``bind_sockets``. Accepts calls after ``start``."""
        return self._add_port(address, _Port([], self._io_threads == 0))

    def add_secure_port(self, address: str, server_credentials: ServerCredentials) -> int:
        """Binds ``address`` with TLS; takes our ``ServerCredentials``, as grpc's own cannot be read."""
        if not isinstance(server_credentials, ServerCredentials):
            raise TypeError(
                f"server_credentials is {type(server_credentials).__name__}; expected "
                "aiorch_server.frontends.grpc.ServerCredentials, because grpc's own hide their key"
            )
        if self._io_threads == 0 or not is_tls_compiled():
            return self._add_port(address, _Port([], True, ssl_context=server_credentials.make_ssl_context()))
        return self._add_port(address, _Port([], False, tls_context=server_credentials.make_tls_context()))

    def renew_credentials(self, server_credentials: ServerCredentials) -> None:
        """Connections of all secure ports get these from now on; those that are open keep what they have.

        Raises ValueError when key or certificates are not usable, and nothing has changed then. On the loop's thread.
        """
        for_loop = server_credentials.make_ssl_context()
        for_threads = [server_credentials.make_tls_context() for port in self._ports if port.tls_context is not None]
        for port in self._ports:
            if port.tls_context is not None:
                port.tls_context.renew(for_threads.pop())
            elif port.ssl_context is not None:
                renew_ssl_context(port.ssl_context, for_loop)

    def _add_port(self, address: str, port: _Port) -> int:
        if self._is_started:
            raise RuntimeError("ports are added before the server is started")
        sockets, number = bind_sockets(address, 1 if port.is_for_loop else self._io_threads, is_shared=self._reuse_port)
        self._ports.append(port._replace(sockets=sockets))
        return number

    # ------------------------------------------------------------------------------------------------ life cycle

    async def start(self) -> None:
        """Begins to accept; once only."""
        if self._is_started or self._stop_at is not None:
            raise self.context_class.usage_error("the server was started or stopped already")
        self._is_started = True
        on_loop = [port for port in self._ports if port.is_for_loop]
        on_threads = [port for port in self._ports if not port.is_for_loop]
        if on_loop:
            await self._listen_on_loop(on_loop)
        if on_threads:
            self._listen_on_threads(on_threads)

    async def _listen_on_loop(self, ports: Sequence[_Port]) -> None:
        loop = asyncio.get_running_loop()
        assert _core.NativeServer is not None
        native = self._make_driver(_core.NativeServer)
        for port in ports:
            (bound,) = port.sockets
            create = loop.create_unix_server if bound.family == socket.AF_UNIX else loop.create_server
            options: dict[str, Any] = {}
            if port.ssl_context is not None:
                # A client that does not say goodbye would otherwise hold up a drain for asyncio's 30 s.
                options = {
                    "ssl_handshake_timeout": self._limits.greeting_timeout_s,
                    "ssl_shutdown_timeout": _LAST_WORDS_S,
                }
            self._listeners.append(await create(native.make_protocol, sock=bound, ssl=port.ssl_context, **options))

    def _listen_on_threads(self, ports: Sequence[_Port]) -> None:
        assert _core.IoThread is not None
        threads = [self._make_driver(_core.IoThread) for _ in range(self._io_threads)]
        for port in ports:
            for thread, bound in zip(threads, itertools.cycle(port.sockets)):  # a unix socket is everybody's
                thread.listen(bound.fileno(), port.tls_context)
        for index, thread in enumerate(threads):
            thread_id = thread.start(f"aiorch-io-{index}")
            if self._on_thread is not None:
                self._on_thread(thread_id)

    def _make_driver(self, kind: type[_Driver]) -> _Driver:
        driver = kind(
            asyncio.get_running_loop(),
            self._on_call,
            self._router,
            fast_path=self._fast_path,
            max_message_bytes=self._max_message_bytes,
            rules=make_rules(self._life),
            ledger=self._ledger,
            packed_encodings=self._compression.packed_encodings,
            passes=self._passes,
            **asdict(self._limits),
        )
        self._drivers.append(driver)
        return driver

    async def stop(self, grace: float | None) -> None:
        """Stops accepting, lets calls end for ``grace`` seconds, then answers the rest with UNAVAILABLE.

        May be called again with less grace; the shortest counts. Returns when everything has ended; servicers that
        do not return within 5 s of being cancelled are left behind and named in the log.
        """
        loop = asyncio.get_running_loop()
        stop_at = loop.time() + max(0.0, grace or 0.0)
        if self._stop_at is None or stop_at < self._stop_at:
            self._stop_at = stop_at
            self._hurry.set()
        if self._shutdown is None:
            self._shutdown = loop.create_task(self._shut_down())
        await asyncio.shield(self._shutdown)

    async def wait_for_termination(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - grpc.aio
        """Waits until ``stop`` has ended: False; or for ``timeout`` seconds: True, it timed out, as grpc.aio says."""
        try:
            await asyncio.wait_for(self._terminated.wait(), timeout)
        except TimeoutError:
            return True
        return False

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return sum(driver.connections for driver in self._drivers)

    @property
    def ledger(self) -> ServerLedger:
        """What all connections hold together, and what was refused for it."""
        return self._ledger

    @property
    def calls(self) -> int:
        """The number of calls that handlers run now."""
        return len(self._tasks)

    @property
    def in_flight(self) -> int:
        """The number of requests of the fast path that have not come back from their queues."""
        return sum(driver.in_flight for driver in self._drivers)

    async def _shut_down(self) -> None:
        try:
            await self._end_connections()
            await self._end_servicers()
        finally:
            for driver in self._drivers:
                driver.close()
            if self._owned_executor is not None:
                self._owned_executor.shutdown(wait=False, cancel_futures=True)
            self._terminated.set()

    async def _end_connections(self) -> None:
        sockets = [(bound, port) for port in self._ports for bound in port.sockets]
        for bound, _ in sockets:
            remove_socket_file(bound)
        for listener in self._listeners:
            listener.close()
        for bound, port in sockets:
            if not self._is_started or not port.is_for_loop:  # the loop closes its own
                bound.close()
        for driver in self._drivers:
            driver.drain()
        disconnected: asyncio.Future[Any] = asyncio.gather(*[driver.wait_disconnected() for driver in self._drivers])
        while not disconnected.done():
            assert self._stop_at is not None
            left = self._stop_at - asyncio.get_running_loop().time()
            if left <= 0:
                break
            self._hurry.clear()
            hurry = asyncio.ensure_future(self._hurry.wait())
            either: set[asyncio.Future[Any]] = {disconnected, hurry}
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
        if not disconnected.done():
            for driver in self._drivers:
                driver.cancel_calls(Code.UNAVAILABLE, "Cancelling all calls")
            await asyncio.wait({disconnected}, timeout=_LAST_WORDS_S)
            for driver in self._drivers:
                driver.abort_connections()
            await disconnected

    async def _end_servicers(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            _, unfinished = await asyncio.wait(set(self._tasks), timeout=_LAST_SERVICERS_S)
            for task in unfinished:
                logger.error("a servicer goes on after its call was cancelled: %s", task.get_name())

    # ----------------------------------------------------------------------------------------------------- calls

    def _on_call(self, call: Call) -> None:
        maximum = self._maximum_concurrent_rpcs
        if maximum is not None and len(self._tasks) >= maximum:
            call.finish(Code.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")
            return
        if self._interceptors:
            cancelled = partial(call.finish, Code.CANCELLED, "RPC cancelled by the server")
            self._start_task(call, self._run_intercepted(call), cancelled)
            return
        try:
            details = _HandlerCallDetails(call.path, decode_metadata(call.metadata) if self._generic else ())
            handler = self._find_handler(details)
        except Exception as error:
            _refuse(call, error)
            return
        if handler is None:
            call.finish(Code.UNIMPLEMENTED, "Method not found!")
            return
        context = self._make_context(call, handler)
        assert self._executor is not None
        # a task that was cancelled before its first step has not finished the call
        self._start_task(call, run_call(call.path, handler, context, self._executor), context.finish)

    def _start_task(self, call: Call, work: Coroutine[Any, Any, None], finish: Callable[[], None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name=call.path)
        self._tasks.add(task)
        task.add_done_callback(partial(_end_task, self._tasks, finish))
        call.set_over_callback(partial(_cancel, task))

    def _make_context(self, call: Call, handler: grpc.RpcMethodHandler) -> ServicerContext:
        return self.context_class(
            call,
            handler.request_deserializer,
            handler.response_serializer,
            self._max_message_bytes,
            self._unpack_budget,
            self._compression,
        )

    async def _run_intercepted(self, call: Call) -> None:
        async def find(details: Any) -> grpc.RpcMethodHandler | None:
            return self._find_handler(details)

        try:
            details = _HandlerCallDetails(call.path, decode_metadata(call.metadata))
            handler = await chain_interceptors(self._interceptors, call.path, find)(details)
        except Exception as error:
            _refuse(call, error)
            return
        if handler is None:
            call.finish(Code.UNIMPLEMENTED, "Method not found!")
            return
        assert self._executor is not None
        await run_call(call.path, handler, self._make_context(call, handler), self._executor)

    def _find_handler(self, details: Any) -> grpc.RpcMethodHandler | None:
        handler = self._registered.get(details.method)
        if handler is None:
            for generic in self._generic:
                handler = generic.service(details)
                if handler is not None:
                    break
        return handler


def _refuse(call: Call, error: Exception) -> None:
    """No handler could be asked for: the client's fault, or that of an interceptor or a generic handler."""
    if isinstance(error, MalformedMetadata):
        call.finish(Code.INVALID_ARGUMENT, str(error))
        return
    logger.error("unexpected error while a handler for %s was looked for", call.path, exc_info=error)
    call.finish(Code.UNKNOWN, f"Unexpected {type(error)}: {error}")


def _end_task(tasks: set[asyncio.Task[None]], finish: Callable[[], None], task: asyncio.Task[None]) -> None:
    tasks.discard(task)
    finish()
    if not task.cancelled() and task.exception() is not None:
        logger.error("a call ended with an error of the door itself", exc_info=task.exception())


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
