"""Both clients over loopback against a real gRPC server that this file scripts."""

import asyncio
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from aiorch_client import (
    NO_RETRIES,
    AsyncClient,
    Client,
    ClientError,
    InferRequest,
    NotFoundError,
    RequestError,
    RetryPolicy,
    ServerError,
    TlsConfig,
    UnavailableError,
    UnreachableError,
)
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import METHODS, SERVICE_NAME
from scripted_server import Peer

QUICK = RetryPolicy(initial_backoff_s=0.01)


@pytest.fixture
def peer():
    served = Peer()
    yield served
    served.server.stop(None).wait(10)


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Blocking:
    """Lets one test drive ``Client`` and ``AsyncClient`` alike: calls run in a thread and are awaited."""

    def __init__(self, client):
        self._client = client

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self._client.close()

    def __getattr__(self, name):
        call = getattr(self._client, name)
        return lambda *args, **named: asyncio.to_thread(call, *args, **named)

    async def stream(self, *args, **named):
        iterator = self._client.stream(*args, **named)
        end = object()
        while (item := await asyncio.to_thread(next, iterator, end)) is not end:
            yield item


@pytest.fixture(params=["sync", "async"])
def make(request):
    return AsyncClient if request.param == "async" else lambda *args, **named: Blocking(Client(*args, **named))


def until(moment):
    """An ``on_infer`` that stays until ``moment`` is set or the call is over."""

    def stay(request, context):
        while context.is_active() and not moment.wait(0.01):
            pass

    return stay


def refuse(code, times, text="busy"):
    left = [times]

    def infer(request, context):
        if left[0]:
            left[0] -= 1
            context.abort(code, text)

    return infer


async def test_cancelling_an_infer_leaves_no_call_open(peer):
    begun = threading.Event()
    stay = until(threading.Event())
    peer.on_infer = lambda request, context: (begun.set(), stay(request, context))
    async with AsyncClient(peer.target) as client:
        task = asyncio.create_task(client.infer("fp32", np.zeros((1, 4), np.float32)))
        assert await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(peer.ended.wait, 10)
        peer.on_infer = lambda request, context: None
        await client.infer("fp32", np.zeros((1, 4), np.float32))


async def test_closing_the_client_ends_its_calls_with_an_error(peer, make):
    begun = threading.Event()
    stay = until(threading.Event())
    peer.on_infer = lambda request, context: (begun.set(), stay(request, context))
    client = make(peer.target)
    task = asyncio.create_task(client.infer("fp32", np.zeros((1, 4), np.float32)))
    assert await asyncio.to_thread(begun.wait, 10)
    await client.close()
    with pytest.raises(RequestError) as caught:
        await task
    assert caught.value.code is grpc.StatusCode.CANCELLED
    assert await asyncio.to_thread(peer.ended.wait, 10)
    with pytest.raises(RequestError, match="closed"):
        await client.server_metadata()


async def test_closing_a_stream_early_leaves_no_call_open(peer):
    request = InferRequest("fp32", np.zeros((1, 4), np.float32))

    async def forever():
        while True:
            yield request
            await asyncio.sleep(0.001)

    async with AsyncClient(peer.target) as client:
        stream = client.stream(forever())
        await anext(stream)
        await stream.aclose()
        assert await asyncio.to_thread(peer.ended.wait, 10)


def test_closing_a_blocking_stream_early_leaves_no_call_open(peer):
    go_on = threading.Event()

    def requests():
        yield InferRequest("fp32", np.zeros((1, 4), np.float32))
        go_on.wait(10)

    with Client(peer.target) as client:
        stream = client.stream(requests())
        next(stream)
        stream.close()
        assert peer.ended.wait(10)
        go_on.set()


async def test_a_deadline_ends_the_call_and_is_not_retried(peer, make):
    peer.on_infer = until(threading.Event())
    async with make(peer.target, retry=QUICK) as client:
        await client.metadata("fp32")
        started = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            await client.infer("fp32", np.zeros((1, 4), np.float32), timeout_s=0.3)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not caught.value.retryable
    assert 0.25 < time.monotonic() - started < 5
    assert peer.count("ModelInfer") == 1
    assert await asyncio.to_thread(peer.ended.wait, 10)


async def test_a_server_that_refuses_twice_is_asked_a_third_time(peer, make):
    peer.on_infer = refuse(grpc.StatusCode.UNAVAILABLE, 2)
    async with make(peer.target, retry=QUICK) as client:
        result = await client.infer("fp32", {"x": [[1, 2, 3, 4]]}, request_id="a")
    assert result["y"].tolist() == [[1, 2, 3, 4]]
    assert (result.id, result.model_version) == ("a", "3")
    assert peer.count("ModelInfer") == 3


@pytest.mark.parametrize(
    ("code", "error_class", "attempts"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError, 3),
        (grpc.StatusCode.INTERNAL, ServerError, 1),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, RequestError, 1),
        (grpc.StatusCode.CANCELLED, RequestError, 1),
        (grpc.StatusCode.UNAUTHENTICATED, RequestError, 1),
    ],
)
async def test_errors_tell_whose_move_it_is(peer, make, code, error_class, attempts):
    peer.on_infer = refuse(code, 100, "because")
    async with make(peer.target, retry=QUICK) as client:
        with pytest.raises(error_class) as caught:
            await client.infer("fp32", {"x": [[1, 2, 3, 4]]})
    assert (caught.value.code, caught.value.details) == (code, "because")
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert peer.count("ModelInfer") == attempts


@pytest.mark.parametrize(
    "inputs",
    [
        {"wrong": [[1, 2, 3, 4]]},
        {},
        np.zeros((1, 5), np.float32),
        np.zeros((1, 4), np.float64),
        [["a", "b", "c", "d"]],
    ],
)
async def test_what_does_not_fit_never_reaches_the_server(peer, make, inputs):
    async with make(peer.target) as client:
        with pytest.raises(RequestError, match="'fp32'"):
            await client.infer("fp32", inputs)
        with pytest.raises(RequestError, match="'fp32'"):
            async for _ in client.stream([InferRequest("fp32", inputs)]):
                pass
    assert peer.count("ModelInfer") == 0


async def test_an_unknown_model_is_not_found(peer, make):
    async with make(peer.target) as client:
        with pytest.raises(NotFoundError, match="unknown model: 'none'"):
            await client.infer("none", [1])
        assert not await client.is_model_ready("none")


async def test_special_datatypes_come_back_as_they_were(peer, make):
    async with make(peer.target) as client:
        assert (await client.infer("text", ["ü", b"\0\0", ""]))["y"].tolist() == ["ü".encode(), b"\0\0", b""]
        half = np.array([0.1, 65504], np.float16)
        assert (await client.infer("fp16", half))["y"].tobytes() == half.tobytes()
        brain = (await client.infer("bf16", np.array([1.0, 1.00390625, -2.5], np.float32)))["y"]
        assert brain.dtype == np.float32
        assert brain.tolist() == [1.0, 1.0, -2.5]
        large = np.arange(4 * 600_000, dtype=np.float32).reshape(-1, 4)  # above gRPC's own limit of 4 MiB
        with pytest.raises(RequestError, match=r"(?i)larger than max"):  # the peer's limit, not the client's
            await client.infer("fp32", large)


async def test_outputs_are_read_only_views(peer, make):
    async with make(peer.target) as client:
        result = await client.infer("fp32", np.zeros((1, 4), np.float32))
    with pytest.raises(ValueError, match="read-only"):
        result["y"][0, 0] = 1


async def test_a_stream_answers_in_order(peer, make):
    requests = [InferRequest("fp32", np.full((1, 4), i, np.float32), request_id=str(i)) for i in range(20)]
    async with make(peer.target) as client:
        results = [result async for result in client.stream(iter(requests))]
    assert [(r.id, float(r["y"][0, 0])) for r in results] == [(str(i), float(i)) for i in range(20)]
    assert peer.count("ModelMetadata") == 1


async def test_a_stream_gives_errors_in_their_place_or_raises_them(peer, make):
    requests = [InferRequest("text", ["a"], request_id=name) for name in ("one", "bad", "two")]
    async with make(peer.target) as client:
        one, bad, two = [item async for item in client.stream(requests, raise_errors=False)]
        assert (one.id, two.id) == ("one", "two")
        assert isinstance(bad, ClientError)
        assert (bad.request_id, bad.details) == ("bad", "bad request")
        seen = []
        with pytest.raises(NotFoundError, match="bad request"):
            async for item in client.stream(requests):
                seen.append(item.id)
        assert seen in ([], ["one"])  # a status may overtake answers that were not read yet


async def test_a_status_is_not_lost_when_a_stream_ends_while_requests_are_sent(peer, make):
    requests = [InferRequest("text", ["a" * 1000], request_id="bad")] * 50
    async with make(peer.target) as client:
        for _ in range(40):
            with pytest.raises(NotFoundError, match="bad request"):
                async for _ in client.stream(requests):
                    pass


async def test_a_stream_ends_after_the_answers_before_a_request_that_does_not_fit(peer, make):
    requests = [InferRequest("text", ["a"], request_id="good"), InferRequest("text", [1]), InferRequest("text", ["b"])]
    seen = []
    async with make(peer.target) as client:
        with pytest.raises(RequestError, match="takes BYTES"):
            async for item in client.stream(requests):
                seen.append(item.id)
    assert seen == ["good"]


async def test_a_stream_has_a_deadline(peer, make):
    async def nothing():
        await asyncio.sleep(30)
        yield

    def nothing_blocking():
        time.sleep(1)
        yield from ()

    async with make(peer.target, timeout_s=0.3) as client:
        with pytest.raises(UnavailableError) as caught:
            async for _ in client.stream(nothing() if isinstance(client, AsyncClient) else nothing_blocking()):
                pass
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_every_other_call(peer, make):
    async with make(peer.target, token="secret", metadata={"tenant": "a"}) as client:
        await client.connect()
        assert await client.is_live()
        assert not await client.is_ready()
        assert await client.is_model_ready("fp32")
        assert (await client.server_metadata()).extensions == ("statistics",)
        assert (await client.metadata("fp32")).inputs[0].shape == (-1, 4)
        assert await client.config("fp32") == {"name": "fp32", "max_batch_size": 8}
        (statistics,) = await client.statistics("fp32")
        assert (statistics.mean_batch, statistics.queue.mean_ms) == (4.0, 2.0)
        (entry,) = await client.index(ready_only=True)
        assert (entry.name, entry.state) == ("fp32", "READY")
        await client.load("fp32", config={"name": "fp32"}, files={"1/model.onnx": b"\0"})
        assert peer.loaded.parameters["config"].string_param == '{"name": "fp32"}'
        assert peer.loaded.parameters["file:1/model.onnx"].bytes_param == b"\0"
        with pytest.raises(RequestError, match="pass config"):
            await client.load("fp32", files={"1/model.onnx": b"\0"})
        await client.unload("fp32", unload_dependents=True)
        assert peer.unloaded.parameters["unload_dependents"].bool_param
        with pytest.raises(RequestError, match="timeout_s"):
            await client.is_live(timeout_s=-1)
    assert all(seen["authorization"] == "Bearer secret" and seen["tenant"] == "a" for _, seen in peer.calls)


async def test_a_server_that_is_not_there(make, free_port):
    async with make(f"127.0.0.1:{free_port}", retry=NO_RETRIES) as client:
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=f"127.0.0.1:{free_port}"):
            await client.connect()
        with pytest.raises(UnavailableError) as caught:
            await client.infer("fp32", [1])
        assert caught.value.retryable
        assert not await client.is_live()
        assert time.monotonic() - started < 10


async def test_a_server_that_accepts_and_stays_silent(make):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with make(f"127.0.0.1:{silent.getsockname()[1]}") as client:
            with pytest.raises(UnreachableError, match=r"within 0\.2 s"):
                await client.connect(timeout_s=0.2)
            with pytest.raises(UnavailableError):
                await client.server_metadata(timeout_s=0.3)


async def test_a_server_that_comes_up_late_is_found_by_retries(make, free_port):
    policy = RetryPolicy(max_attempts=200, initial_backoff_s=0.05, max_backoff_s=0.1)
    async with make(f"127.0.0.1:{free_port}", retry=policy) as client:
        task = asyncio.create_task(client.server_metadata(timeout_s=30))
        with pytest.raises(UnreachableError):
            await client.connect()
        late = grpc.server(ThreadPoolExecutor(2))
        method = METHODS["ServerMetadata"]
        handler = grpc.unary_unary_rpc_method_handler(
            lambda request, context: pb.ServerMetadataResponse(name="late"),
            request_deserializer=method.request.FromString,
            response_serializer=method.response.SerializeToString,
        )
        late.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE_NAME, {"ServerMetadata": handler}),)
        )
        assert late.add_insecure_port(f"127.0.0.1:{free_port}") == free_port
        late.start()
        assert (await task).name == "late"
    late.stop(None).wait(10)


def test_threads_share_a_client(peer):
    with Client(peer.target) as client, ThreadPoolExecutor(16) as pool:
        rows = [np.full((1, 4), i, np.float32) for i in range(200)]
        results = pool.map(lambda row: client.infer("fp32", row)["y"], rows)
        assert all(np.array_equal(sent, received) for sent, received in zip(rows, results, strict=True))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A root, and a server's and a client's certificate signed by it, as paths by name."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new_key, "-keyout", "root.key", "-out", "root.pem", "-days", "2", "-subj", "/CN=test root")
    (folder / "names").write_text("subjectAltName=DNS:models.test")
    for name in ("server", "client"):
        openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial"),
            *("-days", "2", "-extfile", "names", "-out", f"{name}.pem"),
        )
    return folder


async def test_tls_in_both_directions(make, certificates):
    pem = {path.name: path.read_bytes() for path in certificates.iterdir()}
    credentials = grpc.ssl_server_credentials(
        [(pem["server.key"], pem["server.pem"])], root_certificates=pem["root.pem"], require_client_auth=True
    )
    peer = Peer(credentials)
    try:
        good = TlsConfig(
            root=certificates / "root.pem",
            certificate=str(certificates / "client.pem"),
            key=pem["client.key"],
            server_name="models.test",
        )
        async with make(peer.target, tls=good) as client:
            await client.connect()
            assert (await client.infer("text", ["a"]))["y"].tolist() == [b"a"]
        no_client_certificate = TlsConfig(root=pem["root.pem"], server_name="models.test")
        wrong_name = TlsConfig(good.root, good.certificate, good.key, server_name="other.test")
        for tls in (None, no_client_certificate, wrong_name):
            async with make(peer.target, tls=tls, retry=NO_RETRIES) as client:
                with pytest.raises(UnavailableError):
                    await client.infer("text", ["a"], timeout_s=5)
    finally:
        peer.server.stop(None).wait(10)
