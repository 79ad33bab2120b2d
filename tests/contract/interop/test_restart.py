"""A server that is drained and started again under load: clients that wait for it lose no request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from foreign_clients import GrpcioAioClient
from running_site import TIMEOUT_S

from .conftest import SITES, Place, wait_until

CALLERS = 16
ROUNDS = 30


@pytest.mark.parametrize("kind", SITES)
async def test_no_request_is_lost(open_for_restart: Callable[..., Place], kind: str) -> None:
    """GOAWAY tells the client which calls were taken: those are answered, the others it sends again itself."""
    place = await asyncio.to_thread(open_for_restart, kind)
    # after a refused connection grpcio waits; 1 s is its least by default
    backoff = {"initial_reconnect_backoff_ms": 100, "min_reconnect_backoff_ms": 100, "max_reconnect_backoff_ms": 100}
    client = GrpcioAioClient(place.site, place.root, **backoff)
    answered = 0
    is_new_open = asyncio.Event()
    wrong: list[object] = []

    async def ask_on_and_on(caller: int) -> None:
        nonlocal answered
        asked = 0
        while asked < ROUNDS or not is_new_open.is_set():
            rows = np.full((1, 4), caller * 1000 + asked, np.float32)
            try:
                answer = await client.infer(rows, wait_for_ready=True)
                if not np.array_equal(answer, rows):
                    wrong.append((rows, answer))
            except Exception as error:
                wrong.append(error)
            asked += 1
            answered += 1
        for _ in range(3):
            rows = np.full((1, 4), caller, np.float32)
            np.testing.assert_array_equal(await client.infer(rows, wait_for_ready=True), rows)

    callers = [asyncio.create_task(ask_on_and_on(caller)) for caller in range(CALLERS)]
    await wait_until(lambda: answered >= CALLERS * 3, "the first answers")
    port = place.site.port
    await asyncio.to_thread(place.site.begin_stop(TIMEOUT_S).result, TIMEOUT_S)
    await asyncio.to_thread(open_for_restart, kind, port)
    is_new_open.set()
    await asyncio.wait_for(asyncio.gather(*callers), TIMEOUT_S)
    assert wrong == []
    await client.close()
