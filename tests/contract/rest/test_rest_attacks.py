"""Clients that mean harm, on raw sockets and in parallel: bounded memory, no smuggled request, no noise in the log."""

import asyncio
import gzip
import json
import logging

import pytest

from aiorch_server.frontends.unpacking import UnpackBudget

DEADLINE_S = 20.0
BODY = json.dumps({"inputs": [{"name": "IN", "shape": [1], "datatype": "INT32", "data": [7]}]}).encode()
NEXT = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


async def talk(port: int, data: bytes) -> bytes:
    """All that comes back until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), DEADLINE_S)
    finally:
        writer.close()


async def test_two_lengths_are_refused_and_what_follows_is_not_read(door):
    head = b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = await talk(door.port, head + b"0\r\n\r\n" + NEXT)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert door.plane.requests == []


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/models/echo/infer", "/nowhere"])
async def test_a_broken_body_is_no_fault(door, caplog, path):
    """Refused below the application, which may not answer any more, whether or not it reads bodies."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    answer = await talk(door.port, head + b"-1\r\nabc")
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1 ") == 1
    assert (await door.http.get("/v2/health/live")).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_bodies_that_never_end_share_a_bound(door, monkeypatch):
    bodies = door.server._inference["infer"]._limits.bodies
    monkeypatch.setattr(bodies, "limit_bytes", 120_000)  # the doors of these tests share their limits
    head = b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n"
    clients = [await asyncio.open_connection("127.0.0.1", door.port) for _ in range(5)]
    reads = [asyncio.create_task(reader.readline()) for reader, _ in clients]
    try:
        for _, writer in clients:
            writer.write(head + bytes(50_000))
        async with asyncio.timeout(DEADLINE_S):
            while sum(read.done() for read in reads) < 3:
                await asyncio.sleep(0.01)
        assert {read.result() for read in reads if read.done()} == {b"HTTP/1.1 503 Service Unavailable\r\n"}
        assert 0 < bodies.held_bytes <= 120_000
    finally:
        for _, writer in clients:
            writer.close()
        await asyncio.gather(*reads, return_exceptions=True)
    async with asyncio.timeout(DEADLINE_S):
        while bodies.held_bytes:
            await asyncio.sleep(0.01)
    assert (await door.http.post("/v2/models/echo/infer", content=BODY)).status_code == 200
    assert bodies.held_bytes == 0


async def test_compressed_requests_share_a_budget(door):
    """Each is within the body's limit, all together unpack to far more than they are."""
    budget = UnpackBudget(200 << 10, patience_s=0.5)
    route = door.server._inference["infer"]
    route._budget = budget
    padded = gzip.compress(BODY + b" " * (60 << 10))
    door.plane.gate = asyncio.Event()
    requests = [
        asyncio.create_task(
            door.http.post("/v2/models/echo/infer", content=padded, headers={"content-encoding": "gzip"})
        )
        for _ in range(20)
    ]
    done, running = await asyncio.wait(requests, timeout=3.0)
    assert len(door.plane.requests) <= 3
    assert budget.reserved_bytes <= 200 << 10
    assert {task.result().status_code for task in done} == {503}
    assert len(done) >= 17
    door.plane.gate.set()
    assert {response.status_code for response in await asyncio.gather(*running)} == {200}
    assert budget.reserved_bytes == 0
