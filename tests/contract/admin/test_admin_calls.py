"""How admin calls of each kind begin and end at both doors, over servicers that do what the test says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from admin_site import TIMEOUT_S, open_door, refused
from aiorch_proto.admin.v1 import access_pb2, deployments_pb2, registry_pb2
from aiorch_proto.admin.v1.service import METHODS, SERVICE_NAMES, AdminStub, Method
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2 as rpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from aiorch_server import errors
from aiorch_server.frontends.admin.fields import InvalidField
from aiorch_server.frontends.admin.registration import add_admin_services
from aiorch_server.frontends.grpc.reflection import add_reflection_service


class Registry:
    """One method of each shape: GetModel raises ``error``, UploadVersion counts bytes."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.received = 0
        self.ended = asyncio.Event()
        self.arrived = asyncio.Event()

    async def GetModel(self, request: Any, context: Any) -> Any:
        if self.error is not None:
            raise self.error
        return registry_pb2.Model(name=request.name)

    async def RegisterModel(self, request: Any, context: Any) -> bytes:
        return registry_pb2.Model(name="as before").SerializeToString()

    async def UploadVersion(self, messages: AsyncIterator[Any], context: Any) -> Any:
        try:
            async for message in messages:
                if self.error is not None:
                    raise self.error
                self.received += len(message.chunk)
                self.arrived.set()
        finally:
            self.ended.set()
        return registry_pb2.ModelVersion(size_bytes=self.received)


class Deployments:
    """Events until ``error``."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.count = 3
        self.ended = asyncio.Event()

    async def WatchEvents(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            for number in range(self.count):
                yield deployments_pb2.Event(number=number, model=request.model)
            if self.error is not None:
                raise self.error
        finally:
            self.ended.set()


@pytest.fixture
async def site(door: str) -> AsyncIterator[SimpleNamespace]:
    asked: list[tuple[Method, Any]] = []

    def authorize(method: Method, request: Any) -> None:
        asked.append((method, request))
        if getattr(request, "name", "") == "secret" or getattr(request, "model", "") == "secret":
            raise errors.PermissionDenied("not for you")

    server: Any = open_door(door)
    registry, deployments = Registry(), Deployments()
    add_admin_services(server, {"ModelRegistry": registry, "Deployments": deployments}, authorize)
    add_reflection_service(server, SERVICE_NAMES)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield SimpleNamespace(
            registry=registry,
            deployments=deployments,
            asked=asked,
            channel=channel,
            stub=AdminStub(channel),
            target=f"127.0.0.1:{port}",
        )
    await server.stop(None)


async def test_one_message_each_way(site: SimpleNamespace) -> None:
    answer = await site.stub.ModelRegistry.GetModel(registry_pb2.GetModelRequest(name="digits"))
    assert answer.name == "digits"
    ((method, request),) = site.asked
    assert (method.name, request.name) == ("GetModel", "digits")
    answer = await site.stub.ModelRegistry.RegisterModel(registry_pb2.RegisterModelRequest())
    assert answer.name == "as before"


async def test_streams(site: SimpleNamespace) -> None:
    parts = [registry_pb2.UploadVersionRequest(chunk=b"x" * 1000)] * 50
    assert (await site.stub.ModelRegistry.UploadVersion(iter(parts))).size_bytes == 50_000
    request = deployments_pb2.WatchEventsRequest(model="m")
    assert [event.number async for event in site.stub.Deployments.WatchEvents(request)] == [0, 1, 2]


async def test_synchronous_stubs(site: SimpleNamespace) -> None:
    site.registry.error = None

    def call() -> tuple[str, int, list[int], grpc.RpcError]:
        with grpc.insecure_channel(site.target) as channel:
            stub = AdminStub(channel)
            name = stub.ModelRegistry.GetModel(registry_pb2.GetModelRequest(name="digits"), timeout=TIMEOUT_S).name
            parts = [registry_pb2.UploadVersionRequest(chunk=b"xy")] * 3
            size = stub.ModelRegistry.UploadVersion(iter(parts), timeout=TIMEOUT_S).size_bytes
            watched = stub.Deployments.WatchEvents(deployments_pb2.WatchEventsRequest(), timeout=TIMEOUT_S)
            numbers = [event.number for event in watched]
            with pytest.raises(grpc.RpcError) as raised:
                stub.ModelRegistry.GetModel(registry_pb2.GetModelRequest(name="secret"), timeout=TIMEOUT_S)
            return name, size, numbers, raised.value

    name, size, numbers, error = await asyncio.to_thread(call)
    assert (name, size, numbers) == ("digits", 6, [0, 1, 2])
    status = rpc_status.from_call(error)
    assert status is not None
    assert (status.code, status.message) == (7, "not for you")


ERRORS: list[tuple[Exception, str, str, dict[str, Any]]] = [
    (
        errors.NotFoundError("no model 'm'"), "NOT_FOUND", "NOT_FOUND_ERROR",
        {"ResourceInfo": rpc.ResourceInfo(resource_type="model", resource_name="m", description="no model 'm'")},
    ),
    (
        errors.UnknownModel("no model 'm'"), "NOT_FOUND", "UNKNOWN_MODEL",
        {"ResourceInfo": rpc.ResourceInfo(resource_type="model", resource_name="m", description="no model 'm'")},
    ),
    (
        errors.AlreadyExists("there is 'm'"), "ALREADY_EXISTS", "ALREADY_EXISTS",
        {"ResourceInfo": rpc.ResourceInfo(resource_type="model", resource_name="m", description="there is 'm'")},
    ),
    (
        InvalidField("plan.steps[1].percent", "is 101"), "INVALID_ARGUMENT", "INVALID_FIELD",
        {"BadRequest": rpc.BadRequest(field_violations=[{"field": "plan.steps[1].percent", "description": "is 101"}])},
    ),
    (
        errors.RequestError("odd"), "INVALID_ARGUMENT", "REQUEST_ERROR",
        {"BadRequest": rpc.BadRequest(field_violations=[{"description": "odd"}])},
    ),
    (
        errors.PreconditionFailed("it serves"), "FAILED_PRECONDITION", "PRECONDITION_FAILED",
        {"PreconditionFailure": rpc.PreconditionFailure(
            violations=[{"type": "PRECONDITION_FAILED", "subject": "m", "description": "it serves"}]
        )},
    ),
    (
        errors.Conflict("bob was first"), "ABORTED", "CONFLICT",
        {"PreconditionFailure": rpc.PreconditionFailure(
            violations=[{"type": "CONFLICT", "subject": "m", "description": "bob was first"}]
        )},
    ),
    (
        errors.QuotaExceeded("8 uploads are open"), "RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED",
        {
            "QuotaFailure": rpc.QuotaFailure(violations=[{"subject": "m", "description": "8 uploads are open"}]),
            "RetryInfo": rpc.RetryInfo(retry_delay={"seconds": 1}),
        },
    ),
    (
        errors.RegistryUnavailable("the database is away"), "UNAVAILABLE", "REGISTRY_UNAVAILABLE",
        {"RetryInfo": rpc.RetryInfo(retry_delay={"seconds": 1})},
    ),
    (errors.PermissionDenied("no"), "PERMISSION_DENIED", "PERMISSION_DENIED", {}),
    (errors.NotAuthenticated("who"), "UNAUTHENTICATED", "NOT_AUTHENTICATED", {}),
    (errors.ChecksumMismatch("other bytes"), "DATA_LOSS", "CHECKSUM_MISMATCH", {}),
    (errors.UnsupportedRequest("no optimizer"), "UNIMPLEMENTED", "UNSUPPORTED_REQUEST", {}),
    (errors.DeadlineExpired("late"), "DEADLINE_EXCEEDED", "DEADLINE_EXPIRED", {}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code", "reason", "expected"), ERRORS, ids=lambda value: type(value).__name__)
async def test_errors_have_details(
    site: SimpleNamespace, error: Exception, code: str, reason: str, expected: dict[str, Any]
) -> None:
    site.registry.error = site.deployments.error = error
    registry, deployments = site.stub.ModelRegistry, site.stub.Deployments
    calls = [
        registry.GetModel(registry_pb2.GetModelRequest(name="m")),
        collect(deployments.WatchEvents(deployments_pb2.WatchEventsRequest(model="m"))),
    ]
    for call in calls:
        raised, details = await refused(call)
        assert (raised.code().name, raised.details()) == (code, getattr(error, "told", "") or str(error))
        info = details.pop("ErrorInfo")
        assert (info.reason, dict(info.metadata)) == (reason, {"model": "m"})
        assert details == expected
    raised, details = await refused(registry.UploadVersion(iter([registry_pb2.UploadVersionRequest(chunk=b"x")])))
    assert (raised.code().name, details["ErrorInfo"].reason) == (code, reason)


async def collect(call: Any) -> list[Any]:
    return [message async for message in call]


async def test_what_nobody_expected_says_nothing(site: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    site.registry.error = ZeroDivisionError("postgresql://user:password@host")
    error, details = await refused(site.stub.ModelRegistry.GetModel(registry_pb2.GetModelRequest(name="m")))
    assert (error.code().name, error.details()) == ("INTERNAL", "internal error")
    assert details["ErrorInfo"].reason == "INTERNAL_ERROR"
    assert "ZeroDivisionError" in caplog.text
    caplog.clear()


@pytest.mark.parametrize("text", ["ä" * 100_000, "\n" * 100_000, "x" * 1000, "'%'" * 340])
@pytest.mark.parametrize("kind", [errors.RequestError, errors.Conflict, errors.NotFoundError])
async def test_long_texts_pass_a_clients_bounds(site: SimpleNamespace, text: str, kind: type[Exception]) -> None:
    """Clients refuse header lists over 8 KiB; the text is in them three times."""
    site.registry.error = kind(text)
    name = "é" * 10_000
    error, details = await refused(site.stub.ModelRegistry.GetModel(registry_pb2.GetModelRequest(name=name)))
    assert error.code().value[0] == (5 if kind is errors.NotFoundError else kind.code)  # type: ignore[attr-defined]
    assert len(str(error.details()).encode()) <= 1024
    assert details["ErrorInfo"].metadata["model"].startswith("ééé")


@pytest.mark.parametrize("path", [path for path, method in METHODS.items() if hasattr(Registry, method.name)])
async def test_malformed_messages(site: SimpleNamespace, path: str, caplog: pytest.LogCaptureFixture) -> None:
    kinds = {False: site.channel.unary_unary, True: site.channel.stream_unary}
    call = kinds[METHODS[path].client_streams](path)
    sent = iter([b"\xff"]) if METHODS[path].client_streams else b"\xff"
    error, details = await refused(call(sent))
    name = METHODS[path].request.DESCRIPTOR.name
    assert (error.code().name, error.details()) == (
        "INVALID_ARGUMENT",
        f"the 1 bytes of the request are not a valid {name} message",
    )
    assert details["ErrorInfo"].reason == "REQUEST_ERROR"
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_requests_that_are_too_large(site: SimpleNamespace) -> None:
    """Nothing looks into them: a million items would keep the event loop busy for seconds."""
    request = registry_pb2.GetModelRequest(name="x" * (1 << 20))
    error, _ = await refused(site.stub.ModelRegistry.GetModel(request))
    assert (error.code().name, "takes at most 1048576" in str(error.details())) == ("RESOURCE_EXHAUSTED", True)
    watch = deployments_pb2.WatchEventsRequest(model="x" * (1 << 20))
    error, _ = await refused(collect(site.stub.Deployments.WatchEvents(watch)))
    assert error.code().name == "RESOURCE_EXHAUSTED"
    assert site.asked == []


async def test_a_malformed_message_for_a_stream(site: SimpleNamespace) -> None:
    call = site.channel.unary_stream("/aiorch.admin.v1.Deployments/WatchEvents")
    error, _ = await refused(collect(call(b"\xff")))
    assert error.code().name == "INVALID_ARGUMENT"
    assert site.asked == []


async def test_who_may_not_is_asked_first(site: SimpleNamespace) -> None:
    error, details = await refused(site.stub.ModelRegistry.GetModel(registry_pb2.GetModelRequest(name="secret")))
    assert (error.code().name, details["ErrorInfo"].reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    watch = site.stub.Deployments.WatchEvents(deployments_pb2.WatchEventsRequest(model="secret"))
    error, _ = await refused(collect(watch))
    assert error.code().name == "PERMISSION_DENIED"
    assert not site.deployments.ended.is_set()


async def test_a_service_that_is_not_there(site: SimpleNamespace) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await site.stub.Access.WhoAmI(access_pb2.WhoAmIRequest())
    assert raised.value.code().name == "UNIMPLEMENTED"


async def test_a_client_that_leaves_ends_the_stream(site: SimpleNamespace) -> None:
    site.deployments.count = 10_000_000
    call = site.stub.Deployments.WatchEvents(deployments_pb2.WatchEventsRequest())
    await call.read()
    call.cancel()
    await asyncio.wait_for(site.deployments.ended.wait(), TIMEOUT_S)


async def test_a_client_that_leaves_ends_the_upload(site: SimpleNamespace) -> None:
    call = site.stub.ModelRegistry.UploadVersion()
    await call.write(registry_pb2.UploadVersionRequest(chunk=b"x"))
    await asyncio.wait_for(site.registry.arrived.wait(), TIMEOUT_S)
    call.cancel()
    await asyncio.wait_for(site.registry.ended.wait(), TIMEOUT_S)


async def test_an_error_in_the_middle_of_an_upload(site: SimpleNamespace) -> None:
    """The client is told at once, and not when it has sent all."""
    call = site.stub.ModelRegistry.UploadVersion()
    await call.write(registry_pb2.UploadVersionRequest(chunk=b"x"))
    await asyncio.wait_for(site.registry.arrived.wait(), TIMEOUT_S)
    site.registry.error = errors.Conflict("somebody else")
    with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.UsageError):
        await call.write(registry_pb2.UploadVersionRequest(chunk=b"x"))
    error, _ = await refused(call)
    assert error.details() == "somebody else"


async def test_reflection_tells_all(site: SimpleNamespace) -> None:
    """A client that knows nothing finds the services, fetches a file with all that it needs, and makes a call."""
    stub = reflection_pb2_grpc.ServerReflectionStub(site.channel)

    async def ask(**question: str) -> reflection_pb2.ServerReflectionResponse:
        request = reflection_pb2.ServerReflectionRequest(**question)
        (answer,) = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
        return answer

    services = {each.name for each in (await ask(list_services="")).list_services_response.service}
    assert set(SERVICE_NAMES) <= services
    for service in SERVICE_NAMES:
        answer = await ask(file_containing_symbol=service)
        pool = descriptor_pool.DescriptorPool()
        found = [FileDescriptorProto.FromString(file) for file in answer.file_descriptor_response.file_descriptor_proto]
        for file in sorted(found, key=lambda file: len(file.dependency)):
            pool.Add(file)
        assert [method.name for method in pool.FindServiceByName(service).methods] == [
            method.name for method in METHODS.values() if method.service == service
        ]
        if service.endswith(".ModelRegistry"):
            method = pool.FindServiceByName(service).methods_by_name["GetModel"]
            call = site.channel.unary_unary(
                f"/{service}/GetModel",
                request_serializer=GetMessageClass(method.input_type).SerializeToString,
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            assert (await call(GetMessageClass(method.input_type)(name="digits"))).name == "digits"
