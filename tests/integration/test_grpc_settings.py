"""Settings of the gRPC door reach it, on every transport; what it counts is among the metrics."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import InferenceStub

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig
from aiorch_server.errors import InvalidSettings

TRANSPORTS = ["native-0", "native-1", "grpcio"]


class Counter(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Counts what passes."""

    methods: list[str]

    def __init__(self) -> None:
        Counter.methods = []

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        Counter.methods.append(details.method.rpartition("/")[2])
        return await continuation(details)


def configure(root: Path, transport: str, **grpc_section: Any) -> ServerConfig:
    (root / "echo" / "1").mkdir(parents=True)
    (root / "echo" / "config.pbtxt").write_text(
        'backend: "identity" max_batch_size: 8\n'
        'input { name: "INPUT0" data_type: TYPE_INT32 dims: -1 }\n'
        'output { name: "OUTPUT0" data_type: TYPE_INT32 dims: -1 }\n'
    )
    name, _, threads = transport.partition("-")
    return ServerConfig.model_validate(
        {
            "grpc": {"port": 0, "transport": name, "io_threads": int(threads or 1), **grpc_section},
            "http": {"enabled": False},
            "metrics": {"port": 0},
            "repository": {"paths": [str(root)]},
        }
    )


def make_request(values: np.ndarray[Any, Any]) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="echo", raw_input_contents=[values.astype(np.int32).tobytes()])
    tensor = request.inputs.add()
    tensor.name, tensor.datatype, tensor.shape[:] = "INPUT0", "INT32", [1, len(values)]
    return request


async def read_metrics(port: int | None) -> dict[str, float]:
    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            return str(answer.read().decode())

    lines = (await asyncio.to_thread(read)).splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("aiorch_grpc")}


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_what_is_set_is_done(tmp_path: Path, transport: str) -> None:
    config = configure(
        tmp_path,
        transport,
        compression="gzip",
        interceptors=[f"{__name__}:Counter"],
        max_connection_idle_ms=100,
        max_connections=2,
    )
    request = make_request(np.arange(10_000) // 1000)
    async with Application(config) as app:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{app.grpc_port}") as channel:
            stub = InferenceStub(channel)
            response = await stub.ModelInfer(request)
            assert response.raw_output_contents[0] == request.raw_input_contents[0]
            assert (await stub.ServerLive(pb.ServerLiveRequest())).live
            assert Counter.methods == ["ModelInfer", "ServerLive"]
            async with asyncio.timeout(20):  # it has been idle for long enough
                await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        metrics = await read_metrics(app.metrics_port)
        if transport == "grpcio":
            assert metrics == {}
        else:
            assert metrics["aiorch_grpc_refused_connections_total"] == 0
            assert metrics["aiorch_grpc_buffered_bytes"] == 0
            assert {"aiorch_grpc_connections", "aiorch_grpc_refused_messages_total"} < set(metrics)


async def test_an_interceptor_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="'json:loads' cannot be had"):
        async with Application(configure(tmp_path, "native-1", interceptors=["json:loads"])):
            pass


def test_a_server_smaller_than_one_message(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one message of max_message_bytes"):
        configure(tmp_path, "native-1", max_buffered_bytes=1 << 20)
