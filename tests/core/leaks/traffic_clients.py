"""The clients of ``traffic.py``: one round of mixed calls for each line on standard input, then ``done``.

traffic_clients.py PORT
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import grpc
import grpc.aio
import h2.config
import h2.connection
from hand_driven import message, values_of

INFER = "/inference.GRPCInferenceService/ModelInfer"
TIMEOUT_S = 30


async def expect(code: grpc.StatusCode, call: Any) -> None:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        assert error.code() is code, error
    else:
        raise AssertionError(f"{code} expected")


async def call_well(channel: grpc.aio.Channel) -> None:
    infer, slow = channel.unary_unary(INFER), channel.unary_unary("/leaks.Test/Echo")
    for value in range(30):
        answers = await asyncio.gather(*(infer(message(value, n), timeout=TIMEOUT_S) for n in range(10)))
        assert [values_of(answer) for answer in answers] == [[2.0 * value, 2.0 * n] for n in range(10)]
        assert await slow(b"x" * value * 100, timeout=TIMEOUT_S) == b"x" * value * 100


async def call_badly(channel: grpc.aio.Channel) -> None:
    infer, slow = channel.unary_unary(INFER), channel.unary_unary("/leaks.Test/Echo")
    for n in range(20):
        await expect(grpc.StatusCode.INVALID_ARGUMENT, infer(b"no request" * n, timeout=TIMEOUT_S))
        await expect(grpc.StatusCode.INTERNAL, infer(message(-1), timeout=TIMEOUT_S))
        await expect(grpc.StatusCode.FAILED_PRECONDITION, slow(b"fail", timeout=TIMEOUT_S))
        await expect(grpc.StatusCode.DEADLINE_EXCEEDED, slow(b"wait", timeout=0.005))
        await expect(grpc.StatusCode.UNIMPLEMENTED, channel.unary_unary("/leaks.Test/None")(b"", timeout=TIMEOUT_S))


async def give_up(channel: grpc.aio.Channel, chance: random.Random) -> None:
    for n in range(60):
        path, content = (INFER, message(n)) if n % 2 else ("/leaks.Test/Echo", b"wait")
        call = channel.unary_unary(path)(content, timeout=TIMEOUT_S)
        for _ in range(chance.randrange(20)):
            await asyncio.sleep(0)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await call


async def stream(channel: grpc.aio.Channel) -> None:
    for n in range(10):
        call = channel.stream_stream("/leaks.Test/Chat")()
        for part in range(5):
            await call.write(b"%d" % part * 100)
            assert await call.read() == b"%d" % part * 5000
        if n % 2:
            call.cancel()
        else:
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF


async def break_off(port: int, chance: random.Random) -> None:
    """Connections that end somewhere in a good session, or go on with nonsense."""
    fields = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), ("content-type", "application/grpc")]
    for n in range(20):
        client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        client.initiate_connection()
        for stream_id in range(1, 9, 2):
            client.send_headers(stream_id, [*fields[:3], (":path", INFER if n % 2 else "/leaks.Test/Chat"), fields[3]])
            content = message(1)
            client.send_data(stream_id, b"\0" + len(content).to_bytes(4, "big") + content, end_stream=stream_id < 7)
        sent = client.data_to_send()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent[: chance.randrange(len(sent))] if n % 3 else sent + chance.randbytes(100))
        await reader.read(100)
        writer.transport.abort()


async def main() -> None:
    port = int(sys.argv[1])
    chance = random.Random(port)
    while await asyncio.to_thread(sys.stdin.readline):
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
            work = [call_well(channel), call_badly(channel), give_up(channel, chance), stream(channel)]
            await asyncio.gather(*work, break_off(port, chance))
        print("done", flush=True)


asyncio.run(main())
