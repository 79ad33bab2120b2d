"""Clients that are killed, vanish, cancel or talk nonsense, beside clients that must get their own right answers."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
from aiorch_proto.v2 import inference_pb2 as pb
from served import Served, serve

ROUNDS = 12
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
MODEL = '''
import time


class Model:
    """Twice its input; takes its time, so that there is always something in flight; fails for negative numbers."""

    inputs = [("X", "FP32", [2])]
    outputs = [("Y", "FP32", [2])]
    max_batch_size = 8

    def execute(self, inputs):
        time.sleep(0.004)
        if (inputs["X"] < 0).any():
            raise ValueError("negative")
        return {"Y": inputs["X"] * 2}
'''
#: A client in a process of its own: many calls in flight; it is killed, or ends by itself when nobody does.
DOOMED = """
import sys, threading
import grpc
from aiorch_proto.v2 import inference_pb2 as pb
message = bytes.fromhex(sys.argv[2])
channel = grpc.insecure_channel(sys.argv[1])
call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
first = threading.Event()
def again(done):
    first.set()
    if done.code() is grpc.StatusCode.OK:
        call.future(message, timeout=30).add_done_callback(again)
for _ in range(24):
    call.future(message, timeout=30).add_done_callback(again)
first.wait()
print("going", flush=True)
threading.Event().wait(60)
"""

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(params=["native --io-threads 0", "native --io-threads 1", "native --io-threads 2", "grpcio"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "double" / "1").mkdir(parents=True)
    (tmp_path / "double" / "1" / "model.py").write_text(MODEL)
    with serve(tmp_path, "--transport", *request.param.split()) as running:
        yield running


def message_for(*values: float) -> bytes:
    rows = np.repeat(np.array(values, np.float32)[:, None], 2, axis=1)
    request = pb.ModelInferRequest(model_name="double")
    request.inputs.add(name="X", datatype="FP32", shape=rows.shape)
    request.raw_input_contents.append(rows.tobytes())
    return request.SerializeToString()


async def be_good(served: Served, number: int, is_over: asyncio.Event) -> int:
    """Asks until it is over; every answer must be its own."""
    answered = 0
    async with triton_grpc_aio.InferenceServerClient(served.grpc) as client:
        while not is_over.is_set():
            rows = np.full((1 + answered % 3, 2), number * 10_000 + answered, np.float32)
            tensor = triton_grpc.InferInput("X", list(rows.shape), "FP32")
            tensor.set_data_from_numpy(rows)
            id = f"{number}-{answered}"
            result = await client.infer("double", [tensor], request_id=id, client_timeout=30)
            assert result.get_response().id == id
            np.testing.assert_array_equal(result.as_numpy("Y"), rows * 2)
            answered += 1
    return answered


async def be_poisonous(served: Served, is_over: asyncio.Event) -> int:
    """Its rows make the model fail; that must be its own trouble only."""
    failed = 0
    async with triton_grpc_aio.InferenceServerClient(served.grpc) as client:
        while not is_over.is_set():
            tensor = triton_grpc.InferInput("X", [1, 2], "FP32")
            tensor.set_data_from_numpy(np.full((1, 2), -1, np.float32))
            with pytest.raises(triton_grpc.InferenceServerException, match="negative"):
                await client.infer("double", [tensor], client_timeout=30)
            failed += 1
    return failed


async def be_killed(served: Served) -> None:
    for _ in range(3):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DOOMED, served.grpc, message_for(5, 6).hex(), stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), 60) == b"going\n"
        process.kill()
        await process.wait()


async def be_fickle(served: Served, seed: int) -> None:
    """Cancels calls after a random number of turns of the loop."""
    rng = random.Random(seed)
    async with triton_grpc_aio.InferenceServerClient(served.grpc) as client:
        for _ in range(ROUNDS * 4):
            tensor = triton_grpc.InferInput("X", [2, 2], "FP32")
            tensor.set_data_from_numpy(np.ones((2, 2), np.float32))
            task = asyncio.create_task(client.infer("double", [tensor], client_timeout=30))
            for _ in range(rng.randrange(40)):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def begin_infer(data: bytes) -> bytes:
    from hpack import Encoder

    head = Encoder().encode(
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/inference.GRPCInferenceService/ModelInfer"),
            (":authority", "x"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
    )
    body = b"\0" + len(data).to_bytes(4, "big") + data
    return PREFACE + SETTINGS + frame(1, 4, 1, head) + frame(0, 1, 1, body)


async def be_rude(served: Served, seed: int) -> None:
    """Raw bytes, cut off or damaged at any place, and connections that just go."""
    rng = random.Random(seed)
    whole = begin_infer(message_for(1, 2, 3))
    http = b"POST /v2/models/double/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n" + b'{"inputs": [' * 8
    for _ in range(ROUNDS * 6):
        if rng.random() < 0.25:
            address, data = served.http, http
        else:
            address, data = served.grpc, whole
        damaged = bytearray(data[: rng.randrange(1, len(data) + 1)])
        for _ in range(rng.randrange(3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        host, port = address.rsplit(":", 1)
        with contextlib.suppress(ConnectionError):
            _, writer = await asyncio.open_connection(host, int(port))
            if rng.random() < 0.5:  # a reset instead of an orderly end
                linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.write(bytes(damaged))
            await writer.drain()
            writer.close()
            await writer.wait_closed()


async def test_bad_neighbours_harm_nobody(served: Served) -> None:
    is_over = asyncio.Event()
    good = [asyncio.create_task(be_good(served, number, is_over)) for number in range(8)]
    poison = asyncio.create_task(be_poisonous(served, is_over))
    await asyncio.gather(
        be_killed(served),
        *(be_fickle(served, seed) for seed in range(3)),
        *(be_rude(served, seed) for seed in range(3)),
    )
    is_over.set()
    answered = await asyncio.wait_for(asyncio.gather(*good), 60)
    assert min(answered) > 5
    assert await asyncio.wait_for(poison, 60) > 5

    async with triton_grpc_aio.InferenceServerClient(served.grpc) as client:
        async with asyncio.timeout(30):
            while True:  # what the dead left behind leaves the queue
                found = await client.get_inference_statistics("double", "1")
                statistics = found.model_stats[0].inference_stats
                if statistics.success.count >= sum(answered) and await is_idle(served):
                    break
        assert await client.is_server_ready()
    assert served.end() == 0
    assert served.process.returncode == 0


async def is_idle(served: Served) -> bool:
    import httpx

    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://{served.metrics}/metrics")).text
    (line,) = [line for line in text.splitlines() if line.startswith("nv_inference_pending_request_count{")]
    return float(line.rsplit(" ", 1)[1]) == 0
