"""Python clients of other people, unmodified: right values, errors, deadlines, cancellation, streams, compression."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from foreign_clients import CLIENTS, Array, ForeignClient, GrpcioAioClient, GrpcioClient, GrpclibClient, Refused
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from running_site import SERVICE, TIMEOUT_S
from tritonclient.grpc import service_pb2

from .conftest import Place, wait_until

CALLS = 64


def rows(value: float, width: int = 4) -> Array:
    return np.full((1, width), value, np.float32)


def names(can: str = "") -> list[str]:
    return [name for name, client in CLIENTS.items() if not can or can in client.can]  # type: ignore[attr-defined]


@pytest.fixture
async def client(request: pytest.FixtureRequest, place: Place) -> AsyncIterator[ForeignClient]:
    made = CLIENTS[request.param](place.site, place.root)
    yield made
    # whatever happened, the same client's next call is right
    np.testing.assert_array_equal(await made.infer(rows(7)), rows(7))
    await made.close()


@pytest.mark.proves("ModelInfer", by=("grpcio", "tritonclient.grpc*", "tritonclient.http", "grpclib"))
@pytest.mark.parametrize("client", names(), indirect=True)
async def test_many_calls_at_once(client: ForeignClient) -> None:
    answers = await asyncio.gather(*(client.infer(rows(value, 1 + value % 5)) for value in range(CALLS)))
    for value, answer in enumerate(answers):
        np.testing.assert_array_equal(answer, rows(value, 1 + value % 5))


@pytest.mark.parametrize("client", names(), indirect=True)
async def test_large_tensors(client: ForeignClient) -> None:
    """8 MB in and out."""
    wanted = np.arange(1 << 21, dtype=np.float32)[None]
    np.testing.assert_array_equal(await client.infer(wanted), wanted)


@pytest.mark.parametrize("client", names(), indirect=True)
async def test_an_unknown_model(client: ForeignClient) -> None:
    with pytest.raises(Refused) as caught:
        await client.infer(rows(1), "n\u00f6body 100%")
    assert caught.value.text == "Request for unknown model: 'n\u00f6body 100%' is not found"
    assert caught.value.code in ("INVALID_ARGUMENT", "NOT_FOUND")


@pytest.mark.parametrize("client", names("deadline"), indirect=True)
async def test_a_deadline(place: Place, client: ForeignClient) -> None:
    """The server lets go of the request too."""
    with pytest.raises(Refused) as caught:
        await client.infer(rows(1), "gate", timeout_s=0.15)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    await place.wait_pending(0)


@pytest.mark.parametrize("client", names("cancel"), indirect=True)
async def test_a_call_that_is_given_up(place: Place, client: ForeignClient) -> None:
    """It leaves its queue, and its place in the batch is not taken by it: the next two pass the gate together."""
    await asyncio.wait_for(client.infer_and_cancel(rows(1), "gate", place.wait_pending(1)), TIMEOUT_S)
    await place.wait_pending(0)
    answers = await asyncio.gather(client.infer(rows(2), "gate"), client.infer(rows(3), "gate"))
    np.testing.assert_array_equal(np.concatenate(answers), np.concatenate([rows(2), rows(3)]))


@pytest.mark.parametrize("client", names("metadata"), indirect=True)
async def test_metadata(client: ForeignClient) -> None:
    metadata = [("x-text", "a b, c"), ("x-octets-bin", b"\0\xff\x01")]
    np.testing.assert_array_equal(await client.infer(rows(5), metadata=metadata), rows(5))


@pytest.mark.parametrize("client", names("gzip"), indirect=True)
async def test_compressed_requests(client: ForeignClient) -> None:
    wanted = np.zeros((1, 100_000), np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(await client.infer(wanted, is_gzip=True), wanted)


@pytest.mark.proves("ModelStreamInfer", by=("grpcio", "tritonclient.grpc*", "grpclib"))
@pytest.mark.parametrize("client", names("stream"), indirect=True)
async def test_a_stream(client: ForeignClient) -> None:
    """An error is an answer like others, and the stream goes on."""
    models = ["identity", "nobody", "identity", "identity"]
    answers = await client.converse((rows(value), model) for value, model in enumerate(models))
    assert answers[1] == "Request for unknown model: 'nobody' is not found"
    for value in (0, 2, 3):
        np.testing.assert_array_equal(answers[value], rows(value))


@pytest.mark.parametrize("client", names("stream"), indirect=True)
async def test_a_stream_that_shall_end_with_the_first_error(client: ForeignClient) -> None:
    """Metadata of the call decides, and the error is the call's status."""
    with pytest.raises(Refused) as caught:
        await client.converse([(rows(0), "identity"), (rows(1), "nobody")], [("triton_grpc_error", "true")])
    assert caught.value.code in ("INVALID_ARGUMENT", "NOT_FOUND")
    assert caught.value.text == "Request for unknown model: 'nobody' is not found"


# ----------------------------------------------------------------------------------------- health, reflection, pings
@pytest.mark.proves("Health/Watch", by="grpcio")
async def test_health_watch(place: Place) -> None:
    """A stream that the server does not end: it is given up by the client, and the server forgets it."""
    client = GrpcioAioClient(place.site, place.root)
    stub = health_pb2_grpc.HealthStub(client.channel)
    wanted = health_pb2.HealthCheckResponse.SERVING
    calls = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", SERVICE)]
    for call in calls:
        assert (await asyncio.wait_for(call.read(), TIMEOUT_S)).status == wanted
        call.cancel()
    server = place.site.application._grpc
    await wait_until(lambda: server.calls == 0, "the end of the calls")
    np.testing.assert_array_equal(await client.infer(rows(1)), rows(1))
    await client.close()


@pytest.mark.proves("Health/Watch", by="grpclib")
async def test_health_watch_by_grpclib(place: Place) -> None:
    import grpclib.client

    client = GrpclibClient(place.site, place.root)
    types = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
    watch: Any = grpclib.client.UnaryStreamMethod(client.channel, "/grpc.health.v1.Health/Watch", *types)
    async with watch.open() as stream:
        await stream.send_message(health_pb2.HealthCheckRequest(), end=True)
        response = await asyncio.wait_for(stream.recv_message(), TIMEOUT_S)
        assert response.status == health_pb2.HealthCheckResponse.SERVING
        await stream.cancel()
    np.testing.assert_array_equal(await client.infer(rows(1)), rows(1))
    await client.close()


#: What somebody types who knows the server by reflection only: call, request and a part of the answer, as JSON.
TYPED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "health": ("grpc.health.v1.Health/Check", {}, {"status": "SERVING"}),
    "server": (f"{SERVICE}/ServerMetadata", {}, {"name": "aiorchestrator"}),
    "ready": (f"{SERVICE}/ModelReady", {"name": "identity", "version": "1"}, {"ready": True}),
    "config": (f"{SERVICE}/ModelConfig", {"name": "identity"}, {}),
    "infer": (
        f"{SERVICE}/ModelInfer",
        {
            "model_name": "identity",
            "id": "7",
            "inputs": [
                {"name": "INPUT0", "datatype": "FP32", "shape": [1, 2], "contents": {"fp32_contents": [1.5, -2]}}
            ],
        },
        {"id": "7", "model_version": "1", "raw_output_contents": ["AADAPwAAAMA="]},
    ),
    "status": (
        "tensorflow.serving.ModelService/GetModelStatus",
        {"model_spec": {"name": "identity"}},
        {"model_version_status": [{"version": "1", "state": "AVAILABLE", "status": {}}]},
    ),
}


@pytest.mark.proves("ServerReflection/*", by="grpcio")
@pytest.mark.parametrize("typed", TYPED)
async def test_reflection(place: Place, typed: str) -> None:
    """grpcio-reflection's own client builds messages and a call from what it is told, as grpcurl does."""
    client = GrpcioClient(place.site, place.root)
    path, sent, wanted = TYPED[typed]
    service, _, name = path.partition("/")

    def run() -> dict[str, Any]:
        database = ProtoReflectionDescriptorDatabase(client.channel)
        assert service in list(database.get_services())
        pool = DescriptorPool(database)
        method = pool.FindServiceByName(service).FindMethodByName(name)
        request = ParseDict(sent, GetMessageClass(method.input_type)())
        answer_type = GetMessageClass(method.output_type)
        call = client.channel.unary_unary(
            f"/{path}", lambda message: message.SerializeToString(), answer_type.FromString
        )
        answer = call(request, timeout=TIMEOUT_S)
        return MessageToDict(answer, preserving_proto_field_name=True, descriptor_pool=pool)

    found = await asyncio.to_thread(run)
    assert found and found | wanted == found
    await client.close()


@pytest.mark.proves("ServerReflection/*", by="grpcio")
async def test_what_reflection_tells_is_what_tritonclient_has(place: Place) -> None:
    """Each message that a call of the service can hold, field by field, over the wire."""
    client = GrpcioClient(place.site, place.root)

    def describe(message: Any, known: dict[str, Any]) -> dict[str, Any]:
        if message.full_name not in known:
            known[message.full_name] = {
                (field.number, field.name, field.type, field.is_repeated) for field in message.fields
            }
            for field in message.fields:
                if field.message_type is not None:
                    describe(field.message_type, known)
        return known

    def run() -> None:
        told = DescriptorPool(ProtoReflectionDescriptorDatabase(client.channel)).FindServiceByName(SERVICE)
        theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
        assert {method.name for method in told.methods} == {method.name for method in theirs.methods}
        for method in theirs.methods:
            ours = told.FindMethodByName(method.name)
            assert describe(ours.input_type, {}) == describe(method.input_type, {})
            assert describe(ours.output_type, {}) == describe(method.output_type, {})

    await asyncio.to_thread(run)
    await client.close()


async def test_pings_of_a_client_that_keeps_its_connection_alive(place: Place) -> None:
    """Pings as fast as grpcio sends them, with a call open and without, are no reason to be sent away."""
    options = {"keepalive_time_ms": 20, "keepalive_timeout_ms": 5000, "keepalive_permit_without_calls": 1}
    client = GrpcioAioClient(place.site, place.root, **options, **{"http2.max_pings_without_data": 0})
    with pytest.raises(Refused) as caught:
        await client.infer(rows(1), "gate", timeout_s=0.5)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert client.channel.get_state() is grpc.ChannelConnectivity.READY
    np.testing.assert_array_equal(await client.infer(rows(1)), rows(1))
    await client.close()
