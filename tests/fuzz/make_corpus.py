"""Writes the first inputs of each target from what real clients send; run it by hand when a format changes.

grpcio and h2load talk to a grpcio server through a recorder; ModelInfer messages come from protobuf.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import tempfile
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
from aiorch_proto.v2 import inference_pb2 as pb

CORPUS = Path(__file__).parent / "corpus"
TIMEOUT_S = 20


async def echo(requests: object, context: grpc.aio.ServicerContext) -> object:
    async for request in requests:  # type: ignore[attr-defined]
        yield request


class Echo(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.stream_stream_rpc_method_handler(echo)


async def record(port: int, talk: object) -> bytes:
    """What the client sends while ``talk(port)`` runs."""
    sent = bytearray()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, keeps: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if keeps:
                    sent.extend(data)
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server, from_client = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, from_client, keeps=True), pump(to_server, writer, keeps=False))

    recorder = await asyncio.start_server(accept, "127.0.0.1", 0)
    await talk(recorder.sockets[0].getsockname()[1])  # type: ignore[operator]
    recorder.close()
    return bytes(sent)


async def call_unary(port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/fast/Call")
        for content in (b"", b"abc", bytes(300)):
            await call(content, timeout=TIMEOUT_S)


async def call_with_metadata(port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", compression=grpc.Compression.Gzip) as channel:
        for path in ("/slow/Call", "/fast/Call"):
            metadata = (("k", "v"), ("k", "w"), ("trace-bin", bytes(20)), ("long", "x" * 300))
            await channel.unary_unary(path)(b"y" * 2000, timeout=TIMEOUT_S, metadata=metadata)


async def call_streams(port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        both = channel.stream_stream("/slow/Call")()
        for content in (b"a", b"", b"b" * 500):
            await both.write(content)
            await both.read()
        await both.done_writing()
        await both.read()
        cancelled = channel.stream_stream("/slow/Call")()
        await cancelled.write(b"c")
        cancelled.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await cancelled.wait_for_connection()


async def call_large(port: int) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.unary_unary("/fast/Call")(b"z" * 3000, timeout=TIMEOUT_S)
        await channel.unary_unary("/slow/Call")(b"z" * 3000, timeout=TIMEOUT_S)


async def call_h2load(port: int) -> None:
    with tempfile.NamedTemporaryFile() as body:
        body.write(b"\0\0\0\0\x03abc")
        body.flush()
        headers = ["-H", "content-type: application/grpc", "-H", "te: trailers", "-d", body.name]
        load = ["h2load", "-n", "6", "-c", "1", "-m", "3", *headers, f"http://127.0.0.1:{port}/fast/Call"]
        process = await asyncio.create_subprocess_exec(*load, stdout=asyncio.subprocess.DEVNULL)
        assert await process.wait() == 0


def make_messages() -> list[bytes]:
    messages = []
    for rows in (1, 3, 8):
        request = pb.ModelInferRequest(model_name="m", id="" if rows == 1 else f"id{rows}")
        x = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
        request.inputs.add(name="X", datatype="FP32", shape=x.shape)
        request.raw_input_contents.append(x.tobytes())
        if rows == 3:
            request.inputs.add(name="T", datatype="BYTES", shape=[rows, 1])
            request.raw_input_contents.append(b"\x02\0\0\0ab\0\0\0\0\x01\0\0\0c")
            request.outputs.add(name="Y")
            request.parameters["priority"].int64_param = 1
        if rows == 8:
            request.model_version = "1"
            request.parameters["timeout"].int64_param = 5_000_000
            request.parameters["triton_enable_empty_final_response"].bool_param = True
        messages.append(request.SerializeToString())
    wide = pb.ModelInferRequest(model_name="m")
    for i in range(3):
        wide.inputs.add(name=f"i{i}", datatype="UINT8", shape=[2, 3])
        wide.raw_input_contents.append(bytes(6))
    messages.append(wide.SerializeToString())
    typed = pb.ModelInferRequest(model_name="m")
    tensor = typed.inputs.add(name="X", datatype="FP32", shape=[1, 2])
    tensor.contents.fp32_contents.extend([1, 2])
    tensor.parameters["binary_data_size"].int64_param = 8
    typed.parameters["sequence_id"].int64_param = 7
    messages.append(typed.SerializeToString())
    return messages


def make_responses() -> list[bytes]:
    response = pb.ModelInferResponse(model_name="m", model_version="1", id="i")
    for name in ("Y", "Z"):
        response.outputs.add(name=name, datatype="FP32", shape=[2, 1])
        response.raw_output_contents.append(bytes(8))
    return [pb.ModelInferResponse(model_name="m").SerializeToString(), response.SerializeToString()]


def make_landings(rng: random.Random) -> list[bytes]:
    """Bounds, manners, six cuts; then steps, see ``put_step`` in ``fuzz_landing.pyx``."""
    opened = bytes([0, 0])
    alone = opened + bytes([7, 31, 128, 190])  # 32 frames of a message that is longer
    in_turn = opened * 3 + bytes([7, 31, 130, 130, 140, 120]) * 2
    reset = in_turn + bytes([12, 0x80, 12, 0x81, 7, 20, 130])
    padded = opened * 2 + bytes([4, 3, 33, 90, 68]) + bytes([4, 3, 32, 90, 68, 4, 2, 65]) * 4
    slow = bytes([0, 1]) * 2 + bytes([7, 20, 129, 100, 90, 4, 1, 0, 70, 13, 0, 14, 9, 20, 0, 0]) * 2
    early = opened + bytes([7, 3, 128, 200, 4, 48, 0, 70]) + opened + bytes([7, 9, 128, 90])
    nonsense = in_turn + bytes([15, 40]) + rng.randbytes(40)
    # learned in turn, then in another order: frames of the length that was guessed, but of the next stream
    swapped = opened * 3 + bytes([7, 11, 130, 130, 140, 120]) + bytes([4, 0, 0x41, 4, 0, 0x40, 4, 0, 0x42]) * 6
    steps = (alone, in_turn, swapped, reset, padded, slow, early, nonsense)
    manners = (
        bytes([0x1F, 10, 255, 255, 255, 255, 255, 255]),  # all that is there, looked at after each piece
        bytes([0x0F, 12, 255, 200, 110, 150, 101, 160]),
        bytes([0x14, 5, 108, 99, 160, 8, 104, 131]),  # narrow bounds
        bytes([0x1F, 26, 120, 180, 255, 108, 101, 140]),  # guesses anew each time
    )
    return [manner + step for step in steps for manner in manners]


async def make_sessions() -> list[bytes]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    talks = (call_unary, call_with_metadata, call_streams, call_large, call_h2load)
    sessions = [await record(port, talk) for talk in talks]
    await server.stop(None)
    return sessions


def main() -> None:
    rng = random.Random(1)
    sessions = asyncio.run(make_sessions())
    messages, responses = make_messages(), make_responses()
    inputs = {
        # bounds, the tape and its size, the bytes; once whole and once in pieces
        "session": [
            bytes([31, 0xF7, len(tape), 0]) + tape + sent
            for sent in sessions
            for tape in (b"", bytes(rng.choices([7, 40, 200, 1, 3, 0], k=60)))
        ],
        "frames": [bytes([31, 0xF7, 0, 0]) + rng.randbytes(size) for size in (40, 200, 400)],
        "landing": make_landings(rng),
        "scan": messages,
        "protobuf": messages,
        "response": responses,
        "batch": [b"".join(len(m).to_bytes(2, "little") + m for m in some) for some in (messages[:1], messages)],
        "text": [b"1S", b"99999999H", b"application/grpc+proto", "100 % ü €".encode()],
    }
    for target, contents in inputs.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("seed-*"):
            old.unlink()
        for number, content in enumerate(contents):
            (folder / f"seed-{number}").write_bytes(content)
    if shutil.which("h2load") is None:
        print("without h2load")


if __name__ == "__main__":
    main()
