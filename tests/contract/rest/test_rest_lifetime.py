"""Clients that leave, bodies that stall, and the end of the server."""

import asyncio
import contextlib
import gc
import json
import logging
import signal
import socket
import weakref

import httpx
import numpy as np
import pytest
from loop_lag import measure_lag

from aiorch_server.errors import RequestError
from aiorch_server.frontends.rest import RestServer
from aiorch_server.frontends.rest.connection import Patience
from aiorch_server.frontends.rest.planes import RestLimits
from aiorch_server.types import Tensor

BODY = json.dumps({"inputs": [{"name": "IN", "shape": [1], "datatype": "INT32", "data": [7]}]}).encode()
DEADLINE_S = 10


@pytest.fixture(autouse=True)
def no_faults(caplog):
    """A client that leaves is nothing to report, and no reason for an error of ours."""
    yield
    faults = [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not [record for record in faults if record.name.startswith("aiorch_server")], faults


def head(length: int, *extra: str) -> bytes:
    lines = ["POST /v2/models/echo/infer HTTP/1.1", "host: x", f"content-length: {length}", *extra, "", ""]
    return "\r\n".join(lines).encode()


async def read_response(reader: asyncio.StreamReader) -> tuple[int, dict]:
    top = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), DEADLINE_S)
    headers = dict(line.split(b": ", 1) for line in top.split(b"\r\n")[1:] if line)
    body = await asyncio.wait_for(reader.readexactly(int(headers[b"content-length"])), DEADLINE_S)
    return int(top.split()[1]), json.loads(body)


async def test_a_failed_request_is_dropped_with_its_answer(door, monkeypatch):
    """Its error's traceback knows its tensors: in a cycle they would wait for the collector, 64 MiB for each."""
    errors = []

    async def fail(request):
        error = RequestError("not like that")
        errors.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error  # its traceback knows this frame

    monkeypatch.setattr(door.plane, "infer", fail)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            answer = await door.http.post("/v2/models/echo/infer", content=BODY)
            assert answer.status_code == 400 and "not like that" in answer.text
        assert len(errors) == 3
        async with asyncio.timeout(DEADLINE_S):
            while any(error() is not None for error in errors):
                await asyncio.sleep(0.01)
    finally:
        gc.enable()


async def test_a_client_that_leaves_takes_its_request_back(door):
    door.plane.gate = asyncio.Event()
    _, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(head(len(BODY)) + BODY)
    await asyncio.wait_for(door.plane.entered.wait(), DEADLINE_S)
    writer.close()
    await asyncio.wait_for(door.plane.cancelled.wait(), DEADLINE_S)
    door.plane.gate = None
    response = await door.http.post("/v2/models/echo/infer", content=BODY)
    assert response.status_code == 200 and response.json()["outputs"][0]["data"] == [7]


async def test_a_client_that_leaves_does_not_disturb_the_others(door):
    door.plane.gate = asyncio.Event()
    leaving = [await asyncio.open_connection("127.0.0.1", door.port) for _ in range(4)]
    for _, writer in leaving:
        writer.write(head(len(BODY)) + BODY)
    staying = [asyncio.create_task(door.http.post("/v2/models/echo/infer", content=BODY)) for _ in range(4)]
    async with asyncio.timeout(DEADLINE_S):
        while len(door.plane.requests) < 8:
            await asyncio.sleep(0.005)
        for _, writer in leaving:
            writer.transport.abort()
        await door.plane.cancelled.wait()
        door.plane.gate.set()
        assert [response.status_code for response in await asyncio.gather(*staying)] == [200] * 4


async def test_a_client_that_leaves_inside_its_body(door):
    _, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(head(len(BODY)) + BODY[:20])
    await writer.drain()
    writer.transport.abort()
    response = await door.http.post("/v2/models/echo/infer", content=BODY)
    assert response.status_code == 200 and len(door.plane.requests) == 1


async def test_pipelined_requests_are_answered_in_order(door):
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    bodies = [BODY.replace(b"[7]", b"[%d]" % value) for value in (1, 2, 3)]
    writer.write(b"".join(head(len(body)) + body for body in bodies))
    for value in (1, 2, 3):
        status, document = await read_response(reader)
        assert status == 200 and document["outputs"][0]["data"] == [value]
    writer.close()


@pytest.mark.alone
async def test_answers_do_not_wait_for_acknowledgements(door):
    """A head and a body leave at once; without TCP_NODELAY the body waits 40 ms for the client to acknowledge."""
    loop = asyncio.get_running_loop()
    took_s = []
    async with httpx.AsyncClient(base_url=f"http://{door.url}") as client:
        for _ in range(30):
            start_s = loop.time()
            await client.get("/v2")
            took_s.append(loop.time() - start_s)
    assert min(took_s[20:]) < 0.03, took_s  # the first ones are acknowledged at once anyway


async def test_garbage_instead_of_http(door):
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), DEADLINE_S)
    assert answer.startswith(b"HTTP/1.1 400")
    writer.close()
    assert (await door.http.get("/v2/health/live")).status_code == 200


async def test_a_body_that_stands_still_is_given_up(door):
    server = RestServer(door.plane, door.control, port=0, limits=RestLimits(body_idle_timeout_s=0.2))
    port = await server.start()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(len(BODY)) + BODY[:20])
        status, document = await read_response(reader)
        assert status == 408 and "no part of the request body arrived for 0.2 s" in document["error"]
        assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""  # closed: the rest would not be a request
        writer.close()
    finally:
        await server.stop(1)


@contextlib.asynccontextmanager
async def serve(door, **limits):
    server = RestServer(door.plane, door.control, port=0, limits=RestLimits(**limits))
    try:
        yield await server.start()
    finally:
        await server.stop(1)


async def test_a_body_that_drips_is_given_up(door):
    async with serve(door, body_idle_timeout_s=0.3, min_body_bytes_per_s=1_000_000) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(1000))
        answer = asyncio.create_task(read_response(reader))
        while not answer.done():  # each byte is in time, all of them are not
            writer.write(b" ")
            await asyncio.sleep(0.02)
        status, document = await answer
        assert status == 408 and "slower than 1000000 bytes/s" in document["error"]
        writer.close()


@pytest.mark.parametrize("beginning", [b"", b"GET /v2 HTTP/1.1\r\nhost:"], ids=["nothing", "half"])
@pytest.mark.parametrize("earlier", [0, 1], ids=["new", "used"])
async def test_a_head_that_does_not_come_is_given_up(door, beginning, earlier):
    async with serve(door, patience=Patience(head_timeout_s=0.3, keep_alive_s=0.3)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(earlier):
            writer.write(head(len(BODY)) + BODY)
            assert (await read_response(reader))[0] == 200
        writer.write(beginning)
        assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
        writer.close()


async def test_a_head_that_drips_is_given_up(door):
    async with serve(door, patience=Patience(head_timeout_s=0.3)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        gone = asyncio.create_task(reader.read())
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(ConnectionError):
                writer.write(b"GET /v2 HTTP/1.1\r\n")
                while not gone.done():
                    writer.write(b"x-header: 1\r\n")
                    await asyncio.sleep(0.02)
                await gone
        writer.close()


async def test_patience_with_heads_is_not_for_answers(door):
    """A request that takes longer than a head may take, twice over one connection, is answered."""
    async with serve(door, patience=Patience(head_timeout_s=0.2)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            door.plane.gate = asyncio.Event()
            asyncio.get_running_loop().call_later(0.5, door.plane.gate.set)
            writer.write(head(len(BODY)) + BODY)
            assert (await read_response(reader))[0] == 200
        writer.close()


async def test_a_client_that_does_not_take_its_answer_is_given_up(door):
    door.plane.outputs = [Tensor("OUT", "UINT8", (32 << 20,), bytes(32 << 20))]
    body = BODY[:-1] + b', "parameters": {"binary_data_output": true}}'
    server = RestServer(door.plane, door.control, port=0, limits=RestLimits(patience=Patience(write_timeout_s=0.3)))
    port = await server.start()
    try:
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, ("127.0.0.1", port))
            await loop.sock_sendall(client, head(len(body)) + body)
            await asyncio.wait_for(door.plane.entered.wait(), DEADLINE_S)
            async with asyncio.timeout(DEADLINE_S):
                while server.connections:
                    await asyncio.sleep(0.02)
    finally:
        await server.stop(1)


async def test_a_client_that_takes_its_answer_slowly_gets_it(door):
    size = 4 << 20
    door.plane.outputs = [Tensor("OUT", "UINT8", (size,), bytes(size))]
    body = BODY[:-1] + b', "parameters": {"binary_data_output": true}}'
    async with serve(door, patience=Patience(write_timeout_s=0.4)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
        writer.write(head(len(body), "connection: close") + body)
        got = 0
        while chunk := await asyncio.wait_for(reader.read(size // 16), DEADLINE_S):
            got += len(chunk)
            await asyncio.sleep(0.002)
        assert got > size
        writer.close()


async def test_connections_far_beyond_the_limit_are_closed_at_once(door):
    server = RestServer(door.plane, door.control, port=0, max_connections=2)
    port = await server.start()
    try:
        opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
        ended = [asyncio.create_task(reader.read()) for reader, _ in opened]
        async with asyncio.timeout(DEADLINE_S):
            while sum(task.done() for task in ended) < 4:
                await asyncio.sleep(0.01)
        assert server.connections <= 4
        for task, (_, writer) in zip(ended, opened, strict=True):
            writer.close()
            with contextlib.suppress(ConnectionError):
                await task
    finally:
        await server.stop(1)


@pytest.mark.alone
async def test_a_large_answer_in_json_does_not_hold_up_others(door):
    count = 2 << 20
    door.plane.outputs = [Tensor("OUT", "FP32", (count,), np.linspace(0, 1, count, dtype="<f4").tobytes())]
    async with measure_lag() as lag:
        response = await door.http.post("/v2/models/echo/infer", content=BODY)
    assert response.status_code == 200 and len(response.content) > 10 * count
    assert lag.worst_s < 0.5


async def test_stop_lets_running_requests_end(door):
    door.plane.gate = asyncio.Event()
    running = asyncio.create_task(door.http.post("/v2/models/echo/infer", content=BODY))
    await asyncio.wait_for(door.plane.entered.wait(), DEADLINE_S)
    stopping = asyncio.create_task(door.server.stop(DEADLINE_S))
    async with asyncio.timeout(DEADLINE_S):
        while not await is_refused(door.port):
            await asyncio.sleep(0.01)
    assert not running.done() and not stopping.done()
    door.plane.gate.set()
    assert (await asyncio.wait_for(running, DEADLINE_S)).status_code == 200
    await asyncio.wait_for(stopping, DEADLINE_S)


async def test_stop_answers_what_does_not_end_in_time(door):
    door.plane.gate = asyncio.Event()
    running = asyncio.create_task(door.http.post("/v2/models/echo/infer", content=BODY))
    await asyncio.wait_for(door.plane.entered.wait(), DEADLINE_S)
    await asyncio.wait_for(door.server.stop(0.2), DEADLINE_S)
    response = await asyncio.wait_for(running, DEADLINE_S)
    assert response.status_code == 503 and "Server is stopping" in response.json()["error"]
    assert door.plane.cancelled.is_set()


async def test_stop_closes_clients_that_send_nothing(door):
    half = await asyncio.open_connection("127.0.0.1", door.port)
    half[1].write(head(len(BODY)) + BODY[:20])
    idle = await asyncio.open_connection("127.0.0.1", door.port)
    assert (await door.http.get("/v2/health/live")).status_code == 200
    await asyncio.wait_for(door.server.stop(0.2), DEADLINE_S)
    for reader, writer in (half, idle):
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), DEADLINE_S) == b""
        writer.close()
    await door.server.stop(0.2)  # a second stop has nothing to do


async def test_signal_dispositions_are_left_alone(door):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    server = RestServer(door.plane, door.control, port=0)
    await server.start()
    assert {number: signal.getsignal(number) for number in before} == before
    await server.stop(1)
    assert {number: signal.getsignal(number) for number in before} == before


async def test_a_port_in_use_is_an_error_that_names_it(door):
    server = RestServer(door.plane, door.control, port=door.port)
    with pytest.raises(OSError, match=rf"cannot listen on 127\.0\.0\.1:{door.port}: Address already in use"):
        await server.start()
    await server.stop(1)


async def test_connections_beyond_the_limit_are_refused_with_503(door):
    server = RestServer(door.plane, door.control, port=0, max_connections=2)
    port = await server.start()
    idle = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with httpx.AsyncClient() as client, asyncio.timeout(DEADLINE_S):
            assert (await client.get(f"http://127.0.0.1:{port}/v2/health/live")).status_code == 503
    finally:
        idle[1].close()
        await server.stop(1)


async def is_refused(port: int) -> bool:
    with socket.socket() as probe:
        probe.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(probe, ("127.0.0.1", port))
        except ConnectionRefusedError:
            return True
        return False
