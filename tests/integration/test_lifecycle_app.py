"""The whole server in one process and in a process of its own: start, signals, drain, what a client sees meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import InferenceStub
from grpc_health.v1 import health_pb2, health_pb2_grpc

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig
from aiorch_server.errors import ModelLoadError
from aiorch_server.types import ModelIndexEntry

BACKENDS = ("aiorch_backends.identity:IdentityBackend", "aiorch_backends.python:PythonBackend")
DEADLINE_S = 20.0
#: The native one on the event loop, and on one or two I/O threads.
TRANSPORTS = ["native-0", "native-1", "native-2", "grpcio"]
MODEL = """
class Model:
    inputs = [("X", "INT32", [1])]
    outputs = [("Y", "INT32", [1])]
"""


def write_identity(root: Path, name: str, delay_us: int = 0) -> None:
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(
        textwrap.dedent(
            f"""
            backend: "identity"
            max_batch_size: 8
            input {{ name: "INPUT0" data_type: TYPE_INT32 dims: 1 }}
            output {{ name: "OUTPUT0" data_type: TYPE_INT32 dims: 1 }}
            parameters {{ key: "execute_delay_us" value {{ string_value: "{delay_us}" }} }}
            """
        )
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    root.mkdir()
    write_identity(root, "echo")
    write_identity(root, "slow", 400_000)
    return root


def describe_door(transport: str) -> dict[str, Any]:
    name, _, threads = transport.partition("-")
    return {"port": 0, "transport": name, "io_threads": int(threads or 1)}


def configure(root: Path, transport: str = "native", **sections: Any) -> ServerConfig:
    return ServerConfig.model_validate(
        {
            "grpc": describe_door(transport),
            "http": {"port": 0},
            "metrics": {"port": 0},
            "repository": {"paths": [str(root)]},
            "execution": {"backends": list(BACKENDS)},
            **sections,
        }
    )


def make_request(name: str, value: int = 5) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=name, raw_input_contents=[np.array([[value]], np.int32).tobytes()])
    tensor = request.inputs.add()
    tensor.name, tensor.datatype, tensor.shape[:] = "INPUT0", "INT32", [1, 1]
    return request


def read_value(response: pb.ModelInferResponse) -> int:
    return int(np.frombuffer(response.raw_output_contents[0], np.int32)[0])


@contextlib.asynccontextmanager
async def calling(port: int | None) -> AsyncIterator[InferenceStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield InferenceStub(channel)


async def until(condition: Any) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_all_doors_serve_the_same_models(repository: Path, transport: str) -> None:
    entries: list[ModelIndexEntry] = []
    async with (
        Application(configure(repository, transport), observe=entries.append) as app,
        calling(app.grpc_port) as stub,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{app.http_port}") as web,
    ):
        assert read_value(await stub.ModelInfer(make_request("echo"), timeout=DEADLINE_S)) == 5
        assert (await stub.ServerReady(pb.ServerReadyRequest(), timeout=DEADLINE_S)).ready
        metadata = await stub.ServerMetadata(pb.ServerMetadataRequest(), timeout=DEADLINE_S)
        assert "binary_tensor_data" in metadata.extensions
        tensor = {"name": "INPUT0", "datatype": "INT32", "shape": [1, 1], "data": [7]}
        answer = await web.post("/v2/models/echo/infer", json={"inputs": [tensor]})
        assert answer.json()["outputs"][0]["data"] == [7]
        assert (await web.get("/v2/health/ready")).status_code == 200
        statistics = await stub.ModelStatistics(pb.ModelStatisticsRequest(name="echo"), timeout=DEADLINE_S)
        assert statistics.model_stats[0].inference_count == 2
        metrics = (await web.get(f"http://127.0.0.1:{app.metrics_port}/metrics")).text
        assert 'nv_inference_count{model="echo",version="1"} 2' in metrics
    assert [entry.state.value for entry in entries if entry.name == "echo"] == [
        "LOADING",
        "READY",
        "UNLOADING",
        "UNAVAILABLE",
    ]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_every_door_keeps_the_limit_of_headers(repository: Path, transport: str) -> None:
    config = configure(repository, transport, limits={"max_header_bytes": 2048})
    async with Application(config) as app:
        reader, writer = await asyncio.open_connection("127.0.0.1", app.http_port)
        writer.write(b"GET /v2 HTTP/1.1\r\nhost: x\r\nlong: " + b"x" * 8000)  # not even finished
        async with asyncio.timeout(DEADLINE_S):
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        async with calling(app.grpc_port) as stub:
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.ServerLive(pb.ServerLiveRequest(), metadata=(("long", "x" * 8000),), timeout=DEADLINE_S)
            assert (await stub.ServerLive(pb.ServerLiveRequest(), timeout=DEADLINE_S)).live


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = {"key": str(folder / "key.pem"), "certificate": str(folder / "certificate.pem")}
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", files["key"], "-out", files["certificate"]], check=True, capture_output=True)
    return files


@pytest.mark.parametrize("is_mutual", [False, True])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_grpc_over_tls(repository: Path, tls: dict[str, str], transport: str, is_mutual: bool) -> None:
    settings: dict[str, Any] = {**tls, "root": tls["certificate"], "require_client_auth": True} if is_mutual else tls
    config = configure(repository, grpc={**describe_door(transport), "tls": settings})
    certificate, key = Path(tls["certificate"]).read_bytes(), Path(tls["key"]).read_bytes()
    known = grpc.ssl_channel_credentials(certificate, key, certificate)
    stranger = grpc.ssl_channel_credentials(certificate)
    async with Application(config) as app:
        address = f"localhost:{app.grpc_port}"
        async with grpc.aio.secure_channel(address, known) as channel:
            response = await InferenceStub(channel).ModelInfer(make_request("echo"), timeout=DEADLINE_S)
            assert read_value(response) == 5
        async with grpc.aio.secure_channel(address, stranger) as channel:
            call = InferenceStub(channel).ModelInfer(make_request("echo"), timeout=DEADLINE_S)
            if not is_mutual:
                assert read_value(await call) == 5
            else:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await InferenceStub(channel).ModelInfer(make_request("echo"), timeout=DEADLINE_S)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_stop_answers_what_is_under_way(repository: Path, transport: str) -> None:
    async with (
        Application(configure(repository, transport)) as app,
        calling(app.grpc_port) as stub,
    ):
        calls = [stub.ModelInfer(make_request("slow", value), timeout=DEADLINE_S) for value in range(6)]
        await until(lambda: app.manager.find("slow").scheduler.in_flight == 6)
        await app.stop()
        assert [read_value(await call) for call in calls] == list(range(6))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_what_does_not_end_within_the_grace_is_failed_and_the_server_ends(tmp_path: Path, transport: str) -> None:
    write_identity(tmp_path, "stuck", 3_000_000)
    app = Application(configure(tmp_path, transport))
    config = (tmp_path / "stuck" / "config.pbtxt").read_text()
    (tmp_path / "stuck" / "config.pbtxt").write_text(
        config + 'parameters { key: "warmup" value { string_value: "false" } }'
    )
    await app.start()
    async with calling(app.grpc_port) as stub:
        running = stub.ModelInfer(make_request("stuck", 1), timeout=DEADLINE_S)
        await until(lambda: app.manager.find("stuck").scheduler.in_flight == 1)
        await until(lambda: app.manager.find("stuck").scheduler.pending == 0)
        queued = [stub.ModelInfer(make_request("stuck", value), timeout=DEADLINE_S) for value in (2, 3)]
        await until(lambda: app.manager.find("stuck").scheduler.pending == 2)
        started = asyncio.get_running_loop().time()
        await asyncio.wait_for(app.stop(0.2), DEADLINE_S)
        assert asyncio.get_running_loop().time() - started < 2.5
        for call in [running, *queued]:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_swap_under_load_loses_no_request(repository: Path, transport: str) -> None:
    lifecycle = {"control_mode": "explicit", "load_models": ["echo"]}
    async with (
        Application(configure(repository, transport, lifecycle=lifecycle)) as app,
        calling(app.grpc_port) as stub,
    ):
        done = asyncio.Event()
        answered = 0

        async def call(value: int) -> None:
            nonlocal answered
            while not done.is_set():
                response = await stub.ModelInfer(make_request("echo", value), timeout=DEADLINE_S)
                assert read_value(response) == value
                answered += 1

        clients = [asyncio.ensure_future(call(value)) for value in range(16)]
        with (repository / "echo" / "config.pbtxt").open("a") as file:
            for count in range(5):
                print(f"# {count}", file=file, flush=True)
                former, seen = app.manager.find("echo"), answered
                await app.manager.load("echo")
                assert app.manager.find("echo") is not former
                await until(lambda seen=seen: answered > seen + 20)
        done.set()
        await asyncio.gather(*clients)


async def test_metrics_and_statistics_show_the_drain(repository: Path) -> None:
    app = Application(configure(repository))
    await app.start()
    async with calling(app.grpc_port) as stub, httpx.AsyncClient() as web:
        calls = [stub.ModelInfer(make_request("slow", value), timeout=DEADLINE_S) for value in range(2)]
        await until(lambda: app.manager.find("slow").scheduler.in_flight == 2)
        stop = asyncio.ensure_future(app.stop())
        await until(lambda: app.manager.is_stopping)
        metrics = (await web.get(f"http://127.0.0.1:{app.metrics_port}/metrics")).text
        assert 'nv_inference_count{model="slow",version="1"}' in metrics
        assert [read_value(await call) for call in calls] == [0, 1]
        await stop


async def test_a_port_that_is_taken_is_told_and_nothing_stays_open(repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for door in ("http", "metrics", "grpc"):
            sections: dict[str, Any] = {door: {"port": port}}
            app = Application(configure(repository, **sections))
            with pytest.raises(OSError, match=str(port)):
                await app.start()
            assert not app.manager.servables()


async def test_a_repository_that_is_gone_is_told(tmp_path: Path) -> None:
    root = tmp_path / "models"
    root.mkdir()
    config = configure(root)
    root.rmdir()
    with pytest.raises(ModelLoadError, match="cannot be read"):
        await Application(config).start()


async def test_health_follows_the_models(repository: Path) -> None:
    lifecycle = {"control_mode": "explicit", "load_models": ["echo"]}
    async with (
        Application(configure(repository, lifecycle=lifecycle)) as app,
        grpc.aio.insecure_channel(f"127.0.0.1:{app.grpc_port}") as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)

        async def expect(status: int) -> None:
            while (await watch.read()).status != status:
                pass

        serving = health_pb2.HealthCheckResponse.SERVING
        await expect(serving)
        write_identity(repository, "broken")
        (repository / "broken" / "config.pbtxt").write_text('backend: "nobody"')
        with pytest.raises(ModelLoadError):
            await app.manager.load("broken")
        await expect(health_pb2.HealthCheckResponse.NOT_SERVING)
        await app.manager.unload("broken")
        await expect(serving)
        watch.cancel()


# a process of its own

SERVE = """
import asyncio, json, sys
from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig

async def main():
    app = Application(ServerConfig.model_validate(json.loads(sys.argv[1])))
    await app.run(lambda: print(json.dumps([app.grpc_port, app.http_port]), flush=True))

asyncio.run(main())
"""


@contextlib.contextmanager
def serving(config: ServerConfig) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, config.model_dump_json()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def end(process: subprocess.Popen[str]) -> int:
    return await asyncio.wait_for(asyncio.to_thread(process.wait), DEADLINE_S)


async def read_ports(process: subprocess.Popen[str]) -> tuple[int, int]:
    assert process.stdout is not None
    line = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), DEADLINE_S)
    grpc_port, http_port = json.loads(line)
    return grpc_port, http_port


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_the_process_ends_with_0(repository: Path, number: signal.Signals) -> None:
    with serving(configure(repository)) as process:
        port, http_port = await read_ports(process)
        async with calling(port) as stub, httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}") as web:
            calls = [stub.ModelInfer(make_request("slow", value), timeout=DEADLINE_S) for value in range(4)]

            async def pending() -> bool:
                response = await stub.ModelStatistics(pb.ModelStatisticsRequest(name="slow"), timeout=DEADLINE_S)
                return bool(response.model_stats[0].inference_stats.success.count >= 1)

            tensor = {"name": "INPUT0", "datatype": "INT32", "shape": [1, 1], "data": [9]}
            by_rest = asyncio.ensure_future(web.post("/v2/models/slow/infer", json={"inputs": [tensor]}))
            async with asyncio.timeout(DEADLINE_S):
                while not await pending():
                    await asyncio.sleep(0.01)
            process.send_signal(number)
            assert [read_value(await call) for call in calls] == list(range(4))
            answer = await by_rest
            assert (answer.status_code, answer.json()["outputs"][0]["data"]) == (200, [9])
        assert await end(process) == 0


async def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    write_identity(tmp_path, "stuck", 20_000_000)
    with (tmp_path / "stuck" / "config.pbtxt").open("a") as file:
        file.write('parameters { key: "warmup" value { string_value: "false" } }')
    with serving(configure(tmp_path)) as process:
        port, _ = await read_ports(process)
        async with calling(port) as stub:
            call = stub.ModelInfer(make_request("stuck"), timeout=DEADLINE_S)
            statistics = pb.ModelStatisticsRequest(name="stuck")
            await stub.ModelStatistics(statistics, timeout=DEADLINE_S)  # on the same connection: the call has arrived
            process.send_signal(signal.SIGTERM)
            with pytest.raises(grpc.aio.AioRpcError):
                while True:  # until the first signal is taken note of: the model is refused or the port is shut
                    await stub.ModelReady(pb.ModelReadyRequest(name="stuck"), timeout=DEADLINE_S)
            process.send_signal(signal.SIGTERM)
            assert await end(process) == 128 + signal.SIGTERM
            call.cancel()


async def test_a_signal_while_models_load_gives_the_start_up(tmp_path: Path) -> None:
    (tmp_path / "heavy" / "1").mkdir(parents=True)
    marker = tmp_path / "loading"
    (tmp_path / "heavy" / "1" / "model.py").write_text(
        f"import pathlib, time\npathlib.Path({str(marker)!r}).touch()\ntime.sleep(15)\n{MODEL}"
    )
    with serving(configure(tmp_path)) as process:
        await until(marker.exists)
        process.send_signal(signal.SIGTERM)
        assert await end(process) == 0
