"""Server interceptors as grpc.aio has them, and rich errors; the same on all doors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status
from hand_driven import message as infer_message
from hand_driven import values_of

from aiorch_server.errors import InvalidSettings
from aiorch_server.frontends.grpc import FAST_PATH, NativeGrpcServer, import_interceptor

from .conftest import NATIVE_AND_TWO_THREADS, SERVICE, TIMEOUT_S, Door, make_rich_status, wait_until
from .test_door_calls import status_of
from .test_door_threads import Instance, instance, route_to

__all__ = ["instance"]


class Recorder(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Notes what passes, and does what the request's metadata ``do`` says."""

    def __init__(self, name: str = "first", passed: list[Any] | None = None) -> None:
        self.name = name
        self.passed = [] if passed is None else passed
        self.started = 0
        self.cancelled = 0

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        metadata = dict(details.invocation_metadata)
        self.passed.append((self.name, details.method))
        match metadata.get("do"):
            case "raise":
                raise PermissionError("not you")
            case "nothing":
                return None
            case "refuse":

                async def refuse(request: bytes, context: Any) -> bytes:
                    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")
                    return b""

                return grpc.unary_unary_rpc_method_handler(refuse)
            case "wait":
                self.started += 1
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
            case "wrap":
                handler = await continuation(details)

                async def wrapped(request: bytes, context: Any) -> bytes:
                    return b"[" + await handler.unary_unary(request, context) + b"]"

                return grpc.unary_unary_rpc_method_handler(wrapped)
            case "replace":
                return await continuation(details._replace(method=f"/{SERVICE}/SyncEcho"))
        return await continuation(details)


class BadlySkipping(Recorder):
    skipped_methods = (FAST_PATH,)


def test_interceptors_run_in_order(make_door: Callable[..., Door], kind: str) -> None:
    passed: list[Any] = []
    interceptors = [Recorder("first", passed), Recorder("second", passed)]
    door = make_door(kind, interceptors=interceptors)
    channel = door.channel()
    door.check_next_call(channel)
    assert passed == [(name, f"/{SERVICE}/Echo") for name in ("first", "second")]
    echo = door.call("Echo", channel)
    assert echo(b"x", timeout=TIMEOUT_S, metadata=(("do", "wrap"),)) == b"[[x]]"
    assert list(door.call("Chat", channel)(iter([b"a", b"b"]), timeout=TIMEOUT_S)) == [b"re: a", b"re: b"]


def test_an_interceptor_may_ask_for_another_method(native_door: Door, make_door: Callable[..., Door]) -> None:
    """grpc.aio lets nobody make such details."""
    door = make_door(native_door.kind, interceptors=[Recorder()])
    call = door.channel().unary_unary(f"/{SERVICE}/Nothing")
    assert call(b"x", timeout=TIMEOUT_S, metadata=(("do", "replace"),)) == b"x"


def test_what_interceptors_may_do_to_a_call(make_door: Callable[..., Door], kind: str) -> None:
    door = make_door(kind, interceptors=[Recorder()])
    channel = door.channel()
    echo = door.call("Echo", channel)

    def ask(what: str) -> tuple[grpc.StatusCode, str]:
        return status_of(lambda: echo(b"x", timeout=TIMEOUT_S, metadata=(("do", what),)))

    code, text = ask("raise")
    assert code is grpc.StatusCode.UNKNOWN and "not you" in text
    assert ask("nothing")[0] is grpc.StatusCode.UNIMPLEMENTED
    assert ask("refuse") == (grpc.StatusCode.UNAUTHENTICATED, "who are you?")
    unknown = channel.unary_unary("/door.Test/Nothing")
    assert status_of(lambda: unknown(b"", timeout=TIMEOUT_S))[0] is grpc.StatusCode.UNIMPLEMENTED
    door.check_next_call(channel)


@pytest.mark.parametrize("end", ["cancel", "deadline", "stop"])
def test_a_call_that_ends_while_it_is_intercepted(make_door: Callable[..., Door], kind: str, end: str) -> None:
    recorder = Recorder()
    door = make_door(kind, interceptors=[recorder])
    timeout = 0.2 if end == "deadline" else TIMEOUT_S
    running = door.call("Echo").future(b"x", timeout=timeout, metadata=(("do", "wait"),))
    wait_until(lambda: recorder.started == 1)
    if end == "cancel":
        running.cancel()
    elif end == "stop":
        door.stop(0).result(TIMEOUT_S)
        assert running.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    wait_until(lambda: recorder.cancelled == 1, "cancellation of the interceptor")
    if door.is_native:
        wait_until(lambda: door.server.calls == 0)


@pytest.mark.parametrize("kind", NATIVE_AND_TWO_THREADS)
@pytest.mark.parametrize("skips", [False, True])
def test_the_fast_path_is_not_taken_behind_an_interceptors_back(
    make_door: Callable[..., Door], kind: str, instance: Instance, skips: bool
) -> None:
    async def model_infer(request: bytes, context: Any) -> bytes:
        return b"python"

    def register(server: Any) -> None:
        service, method = FAST_PATH[1:].split("/")
        handler = grpc.unary_unary_rpc_method_handler(model_infer)
        server.add_registered_method_handlers(service, {method: handler})

    recorder = BadlySkipping() if skips else Recorder()
    door = make_door(kind, router=route_to(instance.scheduler), register=register, interceptors=[recorder])
    channel = door.channel()
    infer = channel.unary_unary(FAST_PATH)
    answer = infer(infer_message(21), timeout=TIMEOUT_S)
    if skips:
        assert values_of(answer) == [42.0]
        assert infer(b"declined", timeout=TIMEOUT_S) == b"python"
        assert recorder.passed == []
    else:
        assert answer == b"python" and recorder.passed == [("first", FAST_PATH)]
    door.check_next_call(channel)
    assert recorder.passed[-1] == ("first", f"/{SERVICE}/Echo")


def test_what_is_no_interceptor() -> None:
    with pytest.raises(ValueError, match="must be ServerInterceptor"):
        NativeGrpcServer(interceptors=[object()])
    recorder = Recorder()
    recorder.skipped_methods = FAST_PATH + "More"
    with pytest.raises(ValueError, match="expected a collection of names"):
        NativeGrpcServer(interceptors=[recorder])
    assert isinstance(import_interceptor(f"{__name__}:Recorder"), Recorder)
    for name in ("nowhere.at.all:x", f"{__name__}:Nothing", f"{__name__}:SERVICE"):
        with pytest.raises(InvalidSettings, match=name):
            import_interceptor(name)


# ------------------------------------------------------------------------------------------------------- rich errors
@pytest.mark.parametrize("request_", [b"abort", b"trailing"])
def test_rich_errors(door: Door, request_: bytes) -> None:
    """https://grpc.io/docs/guides/error/#richer-error-model"""
    check_rich_error(door, "RichAbort", request_)


def test_rich_errors_from_a_thread(native_door: Door) -> None:
    """grpc.aio has no abort_with_status there."""
    check_rich_error(native_door, "SyncRichAbort", b"")


def check_rich_error(door: Door, method: str, request: bytes) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        door.call(method)(request, timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    status = rpc_status.from_call(caught.value)
    assert status == make_rich_status()
