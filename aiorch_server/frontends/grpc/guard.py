"""The gate before every method of the gRPC doors.

What is registered through ``GuardedServer`` asks the gate before a request reaches its code, and again before each
further request or answer of a stream. Which models a call may touch is asked by the planes, of the access that is set
here for the task of the call.
"""

from __future__ import annotations

import inspect
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from aiorch_server.errors import AiorchError, Code, InternalError, NotAuthenticated
from aiorch_server.frontends.grpc.methods import RpcMethod
from aiorch_server.frontends.grpc.status import abort_call, describe_error, to_status
from aiorch_server.security.access import Access, current_access
from aiorch_server.security.authenticator import Credentials
from aiorch_server.security.gate import Gate
from aiorch_server.security.identity import current_principal

#: What the gate lets through the compiled door by itself, once it has seen it here.
_FAST: Final = "/inference.GRPCInferenceService/ModelInfer"
_AUTHORIZATION: Final = "authorization"
#: (path, error, context) -> aborts the call
Refuse = Callable[[str, AiorchError, Any], Awaitable[Any]]


async def refuse_call(path: str, error: AiorchError, context: Any) -> Any:
    """Ends the call with the status and text of ``error``."""
    await abort_call(error, context)


class GuardedServer:
    """A server as services see it when they register: each method that they give gets ``gate`` before it.

    ``refuse`` ends the calls that the gate does not let through.
    """

    def __init__(self, server: Any, gate: Gate, refuse: Refuse = refuse_call) -> None:
        self._server = server
        self._gate = gate
        self._refuse = refuse

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """Generic handlers, whose methods are looked up with each call."""
        self._server.add_generic_rpc_handlers([_GuardedService(each, self._gate, self._refuse) for each in handlers])

    def add_registered_method_handlers(self, service: str, methods: Mapping[str, RpcMethod]) -> None:
        """Methods by name of one service."""
        guarded = {
            name: guard_method(f"/{service}/{name}", method, self._gate, self._refuse)
            for name, method in methods.items()
        }
        self._server.add_registered_method_handlers(service, guarded)

    def add_end(self) -> None:
        """Registers what answers all other methods: UNIMPLEMENTED, to callers who are known. The last to be added."""
        self._server.add_generic_rpc_handlers([_Unknown(self._gate)])


def guard_method(path: str, method: RpcMethod, gate: Gate, refuse: Refuse = refuse_call) -> RpcMethod:
    """``method`` behind ``gate``."""
    guarded = _GuardedMethod(path, gate, refuse)
    if method.unary_unary is not None:
        return method._replace(unary_unary=guarded.wrap_one(method.unary_unary))
    if method.stream_unary is not None:
        return method._replace(stream_unary=guarded.wrap_one(method.stream_unary, asks_at_end=True))
    if method.unary_stream is not None:
        return method._replace(unary_stream=guarded.wrap_many(method.unary_stream))
    assert method.stream_stream is not None
    if inspect.isasyncgenfunction(method.stream_stream):
        return method._replace(stream_stream=guarded.wrap_many(method.stream_stream))
    return method._replace(stream_stream=guarded.wrap_one(method.stream_stream))


def read_credentials(context: Any) -> Credentials:
    """What a call shows: its authorization metadata, and the certificate that its connection has proved."""
    values = tuple(
        value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
        for key, value in context.invocation_metadata() or ()
        if key == _AUTHORIZATION
    )
    return Credentials(values, _read_certificate(context))


def _read_certificate(context: Any) -> bytes:
    read = getattr(context, "peer_certificate", None)
    if read is not None:
        certificate: bytes = read()
        return certificate
    found = context.auth_context().get("x509_pem_cert") or ()  # grpc's own server
    return ssl.PEM_cert_to_DER_cert(found[0].decode("ascii")) if found else b""


class _GuardedMethod:
    """One method's way through the gate."""

    def __init__(self, path: str, gate: Gate, refuse: Refuse) -> None:
        self._path = path
        self._gate = gate
        self._refuse = refuse

    def wrap_one(self, function: Any, *, asks_at_end: bool = False) -> Any:
        """What gives one answer, or writes its answers itself.

        ``asks_at_end``: what a stream is for is done when it has ended, so the gate is asked then, too.
        """

        async def serve(request: Any, context: Any) -> Any:
            access = await self._enter(context)
            is_stream = hasattr(request, "__aiter__")
            try:
                requests = self._renew_each(request, access, asks_at_end) if is_stream else request
                answer = await function(requests, context)
                if is_stream or access.is_complete:  # a stream may have no requests, and what it writes was asked for
                    if self._path == _FAST:
                        self._gate.admit(access, access.model)
                    return answer
                raise _find_fault(self._path)
            except AiorchError as error:
                fault = error
            return await self._refuse(self._path, fault, context)

        return serve

    def wrap_many(self, function: Any) -> Any:
        """What yields its answers."""

        async def serve(request: Any, context: Any) -> AsyncIterator[Any]:
            access = await self._enter(context)
            try:
                is_stream = hasattr(request, "__aiter__")
                async for answer in function(self._renew_each(request, access) if is_stream else request, context):
                    await self._gate.renew(access)
                    if not access.is_complete:
                        raise _find_fault(self._path)
                    yield answer
                return
            except AiorchError as error:
                fault = error
            await self._refuse(self._path, fault, context)

        return serve

    async def _enter(self, context: Any) -> Access:
        try:
            access = await self._gate.enter(self._path, read_credentials(context))
        except AiorchError as error:
            fault = error
        else:
            current_access.set(access)
            current_principal.set(access.principal)
            return access
        await self._refuse(self._path, fault, context)
        raise AssertionError("abort returned")

    async def _renew_each(
        self, requests: AsyncIterator[Any], access: Access, asks_at_end: bool = False
    ) -> AsyncIterator[Any]:
        """Each request of a stream, as long as the caller may still send it."""
        async for request in requests:
            await self._gate.renew(access)
            yield request
        if asks_at_end:
            await self._gate.renew(access)


class _GuardedService:
    """A generic handler behind the gate."""

    def __init__(self, service: Any, gate: Gate, refuse: Refuse) -> None:
        self._service = service
        self._gate = gate
        self._refuse = refuse
        self._guarded: dict[str, RpcMethod] = {}

    def service_name(self) -> str:
        """The full name of the service."""
        name: str = self._service.service_name()
        return name

    def service(self, details: Any) -> RpcMethod | None:
        """The method that the call with these details asks for, None where the service has it not."""
        path = details.method
        if path not in self._guarded:
            method = self._service.service(details)
            if method is None:
                return None
            self._guarded[path] = guard_method(path, method, self._gate, self._refuse)
        return self._guarded[path]


class _Unknown:
    """Answers what no service has."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def service(self, details: Any) -> RpcMethod:
        """A method that ends with what the caller may know."""

        async def refuse(requests: Any, context: Any) -> None:
            code, text = to_status(Code.UNIMPLEMENTED), "Method not found!"
            try:
                await self._gate.identify(read_credentials(context))
            except (NotAuthenticated, AiorchError) as error:
                code, text = describe_error(error)
            await context.abort(code, text)

        # A stream, whatever the client means: of others the message would be read first.
        return RpcMethod(request_streaming=True, response_streaming=True, stream_stream=refuse)


def _find_fault(path: str) -> InternalError:
    return InternalError(f"{path} did not ask what its caller may do, so its answer was held back")
