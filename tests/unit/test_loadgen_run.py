"""The generator against a real grpc.aio server: cancel, crash and bad answers first, then the figures."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from aiorch_client.loadgen import (
    MODEL_INFER,
    MODEL_STREAM_INFER,
    Arrival,
    LoadPlan,
    LoadResult,
    TargetUnreachable,
    drive_load,
    run_load,
)
from aiorch_proto.v2 import inference_pb2 as pb

Method = Callable[[bytes, Any], Awaitable[bytes]]


@dataclass
class Server:
    """A raw-bytes server whose method a test chooses; counts what is under way."""

    method: Method
    target: str = ""
    received: list[bytes] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    cancelled: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    busy: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: bytes, context: Any) -> bytes:
        self.received.append(request)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        self.idle.clear()
        self.busy.set()
        try:
            return await self.method(request, context)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.under_way -= 1
            if not self.under_way:
                self.idle.set()


@asynccontextmanager
async def serve(method: Any, path: str = MODEL_INFER, target: str = "127.0.0.1:0") -> AsyncIterator[Server]:
    service, name = path.strip("/").split("/")
    state = Server(method)
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(state.answer)
    if path == MODEL_STREAM_INFER:
        handler = grpc.stream_stream_rpc_method_handler(method)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
    state.target = f"127.0.0.1:{server.add_insecure_port(target)}"
    await server.start()
    try:
        yield state
    finally:
        await server.stop(None)


async def echo(request: bytes, context: Any) -> bytes:
    return request


def make_plan(server: Server, **more: Any) -> LoadPlan:
    given: dict[str, Any] = {"target": server.target, "requests": [b"x"], "duration_s": 0.3, "warm_up_s": 0.0}
    return LoadPlan(**(given | more))


@pytest.mark.parametrize("rate", [None, 200.0])
async def test_cancel_leaves_no_call_open(rate: float | None) -> None:
    async def hang(request: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async with serve(hang) as server:
        task = asyncio.create_task(drive_load(make_plan(server, rate=rate, streams=4, duration_s=30)))
        async with asyncio.timeout(10):
            await server.busy.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await server.idle.wait()
        assert server.cancelled == len(server.received) > 0


async def test_unreachable_target_is_told_within_the_connect_timeout() -> None:
    plan = LoadPlan(target="127.0.0.1:1", requests=[b"x"], connect_timeout_s=0.3)
    started = time.monotonic()
    with pytest.raises(TargetUnreachable, match=r"127\.0\.0\.1:1.*0\.3 s"):
        await drive_load(plan)
    assert time.monotonic() - started < 3


async def test_deadline_ends_a_server_that_never_answers() -> None:
    async def hang(request: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async with serve(hang) as server, asyncio.timeout(10):
        result = await drive_load(make_plan(server, rate=50, timeout_s=0.2))
    assert result.errors == {"DEADLINE_EXCEEDED": result.requests}
    assert result.requests > 0
    assert result.req_per_s == 0
    assert result.to_dict()["latency_us"]["p99"] is None


async def test_errors_are_counted_by_code_and_kept_out_of_latencies() -> None:
    async def refuse_some(request: bytes, context: Any) -> bytes:
        if request == b"full":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "queue full")
        if request == b"bad":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "bad")
        return request

    async with serve(refuse_some) as server:
        result = await drive_load(make_plan(server, requests=[b"ok", b"full", b"bad"], rate=300))
    assert set(result.errors) == {"UNAVAILABLE", "INVALID_ARGUMENT"}
    assert result.latencies_us().size == result.requests - sum(result.errors.values())
    assert result.codes[:6].tolist() == [0, 14, 3, 0, 14, 3]


async def test_answers_of_others_are_caught() -> None:
    async def mix_up(request: bytes, context: Any) -> bytes:
        return b"b" if request == b"a" else request

    asked = [b"a", b"b"]
    async with serve(mix_up) as server:
        plan = make_plan(server, requests=asked, check=lambda index, response: response == asked[index])
        result = await drive_load(plan)
    assert result.errors == {"WRONG_ANSWER": (result.requests + 1) // 2}


async def test_server_that_stops_midway_is_counted_not_raised() -> None:
    async with serve(echo) as server:
        task = asyncio.create_task(drive_load(make_plan(server, rate=200, duration_s=0.6, timeout_s=2)))
        async with asyncio.timeout(10):
            await server.busy.wait()
    async with asyncio.timeout(10):
        result = await task
    assert result.lost == result.errors["LOST"] > 0


async def test_callers_do_not_spin_when_the_server_has_left() -> None:
    async with serve(echo) as server:
        plan = make_plan(server, streams=4, channels=2, duration_s=60, connect_timeout_s=0.5)
        task = asyncio.create_task(drive_load(plan))
        async with asyncio.timeout(10):
            await server.busy.wait()
    async with asyncio.timeout(20):  # long before its time
        result = await task
    # each caller loses the request that it waits for, or the next one, and sends no more
    assert 0 < result.lost <= 8
    assert int((result.codes != 0).sum()) <= 16
    assert result.is_target_gone
    assert result.to_dict()["lost"] == result.lost


async def test_callers_go_on_when_the_server_is_back() -> None:
    async def hang(request: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async with serve(hang) as server:
        plan = make_plan(server, streams=2, duration_s=6, connect_timeout_s=20)
        task = asyncio.create_task(drive_load(plan))
        async with asyncio.timeout(10):
            await server.busy.wait()
    async with serve(echo, target=server.target) as again, asyncio.timeout(30):
        await again.busy.wait()
        result = await task
    assert 0 < result.lost <= 4
    assert not result.is_target_gone
    assert again.received


async def test_sequences_are_whole_and_have_ids_of_their_own() -> None:
    sent: list[pb.ModelInferRequest] = []

    async def note(request: bytes, context: Any) -> bytes:
        sent.append(pb.ModelInferRequest.FromString(request))
        if len(sent) == 7:
            await context.abort(grpc.StatusCode.INTERNAL, "this one failed")
        await asyncio.sleep(0.001)
        return request

    asked = [pb.ModelInferRequest(model_name="m", raw_input_contents=[b"abc"]).SerializeToString()]
    async with serve(note) as server:
        result = await drive_load(make_plan(server, requests=asked, streams=3, sequence_length=4))
    assert result.errors == {"INTERNAL": 1}
    sequences: dict[int, list[tuple[bool, bool]]] = {}
    for request in sent:
        assert (request.model_name, list(request.raw_input_contents)) == ("m", [b"abc"])
        flags = [request.parameters[name].bool_param for name in ("sequence_start", "sequence_end")]
        sequences.setdefault(request.parameters["sequence_id"].int64_param, []).append((flags[0], flags[1]))
    failed = sent[6].parameters["sequence_id"].int64_param
    assert len(sequences) > 3 and min(sequences) > 0
    for number, places in sequences.items():
        assert [start for start, _ in places] == [True] + [False] * (len(places) - 1)
        if number != failed:
            assert [end for _, end in places] == [False] * (len(places) - 1) + [True]
            assert len(places) <= 4
    with pytest.raises(ValueError, match="sequences are for a closed loop"):
        make_plan(server, sequence_length=4, rate=5.0)


async def test_a_streamed_request_ends_with_its_last_answer() -> None:
    async def count(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            number = int(pb.ModelInferRequest.FromString(request).id)
            for _ in range(number):
                await asyncio.sleep(0.01)
                yield pb.ModelStreamInferResponse(infer_response={"id": str(number)}).SerializeToString()
            if number == 1:
                yield pb.ModelStreamInferResponse(error_message="one is not enough").SerializeToString()

    asked = [pb.ModelInferRequest(id=number).SerializeToString() for number in "130"]
    async with serve(count, MODEL_STREAM_INFER) as server:
        result = await drive_load(make_plan(server, requests=asked, path=MODEL_STREAM_INFER))
    assert set(result.codes[0::3].tolist()) == {2} and set(result.codes[1:-1:3].tolist()) == {0}
    took = (result.answered_ns - result.sent_ns)[1:-1:3]
    assert took.min() >= 30_000_000


@pytest.mark.alone
async def test_open_loop_latency_counts_from_the_due_time() -> None:
    """A stall of the server must show in every request that it held up, not only in the one that it hit."""
    stall_s, rate = 0.4, 200
    gate = asyncio.Lock()
    stalled = False

    async def stall_once(request: bytes, context: Any) -> bytes:
        nonlocal stalled
        async with gate:
            if not stalled:
                stalled = True
                await asyncio.sleep(stall_s)
            return request

    async with serve(stall_once) as server:
        result = await drive_load(make_plan(server, rate=rate, arrival=Arrival.CONSTANT, duration_s=0.8))
    held_up = int((result.latencies_us() > 10_000).sum())
    assert held_up >= rate * stall_s * 0.8
    assert result.percentile_us(25) < result.percentile_us(50) < stall_s * 1e6 * 1.5


async def test_requests_that_wait_for_a_place_carry_their_wait() -> None:
    async def take_20_ms(request: bytes, context: Any) -> bytes:
        await asyncio.sleep(0.02)
        return request

    async with serve(take_20_ms) as server:
        result = await drive_load(make_plan(server, rate=200, arrival=Arrival.CONSTANT, max_in_flight=2))
    assert server.most_under_way == 2
    assert result.requests == 60
    # 2 at a time and 20 ms each is half the offered rate: the last waits as long as the run is.
    assert result.latencies_us()[-1] > 200_000
    assert result.to_dict()["send_lag_us"]["max"] > 200_000


async def test_closed_loop_keeps_channels_times_streams_under_way() -> None:
    async def take_10_ms(request: bytes, context: Any) -> bytes:
        await asyncio.sleep(0.01)
        return request

    async with serve(take_10_ms) as server:
        result = await drive_load(make_plan(server, channels=2, streams=3))
    assert server.most_under_way == 6
    assert result.errors == {}
    assert result.req_per_s < 6 / 0.01
    assert result.percentile_us(50) >= 10_000


async def test_channels_are_connections_of_their_own() -> None:
    peers: set[str] = set()

    async def note_peer(request: bytes, context: Any) -> bytes:
        peers.add(context.peer())
        return request

    async with serve(note_peer) as server:
        await drive_load(make_plan(server, channels=3))
    assert len(peers) == 3


async def test_warm_up_is_offered_but_not_measured() -> None:
    async with serve(echo) as server:
        result = await drive_load(make_plan(server, rate=200, arrival=Arrival.CONSTANT, warm_up_s=0.2))
    assert len(server.received) == result.codes.size == 100
    assert result.requests == 60
    assert result.window_s == pytest.approx(0.3)


async def test_closed_loop_stops_at_its_bound_and_says_so() -> None:
    async with serve(echo) as server:
        result = await drive_load(make_plan(server, duration_s=30, max_requests=50))
    assert result.is_cut_short
    assert result.codes.size == 50
    assert result.to_dict()["is_cut_short"]


async def test_metadata_and_messages_arrive_as_given() -> None:
    seen: list[Any] = []

    async def note(request: bytes, context: Any) -> bytes:
        seen.append(dict(context.invocation_metadata()).get("x-tenant"))
        return request

    async with serve(note) as server:
        await drive_load(make_plan(server, requests=[b"one", b"two"], metadata=[("x-tenant", "a")], max_requests=4))
    assert server.received == [b"one", b"two", b"one", b"two"]
    assert set(seen) == {"a"}


async def test_progress_is_told_and_its_failure_is_not_hidden() -> None:
    told: list[tuple[float, int]] = []
    async with serve(echo) as server:
        await drive_load(make_plan(server, duration_s=0.7), lambda part, answers: told.append((part, answers)))
        assert len(told) >= 2
        assert [part for part, _ in told] == sorted(part for part, _ in told)
        assert told[-1][1] > 0

        def fail(part: float, answers: int) -> None:
            raise RuntimeError("display is gone")

        with pytest.raises(ExceptionGroup) as caught:
            await drive_load(make_plan(server, duration_s=30), fail)
    assert caught.group_contains(RuntimeError, match="display is gone")


async def test_result_survives_a_file(tmp_path: Path) -> None:
    async with serve(echo) as server:
        result = await drive_load(make_plan(server, rate=100))
    result.save(tmp_path / "run.npz")
    again = LoadResult.load(tmp_path / "run.npz")
    assert again.to_dict() == result.to_dict()
    assert (again.answered_ns == result.answered_ns).all()
    assert json.loads(json.dumps(result.to_dict()))["latency_us"]["p50"] > 0


def test_figures_are_those_of_the_window() -> None:
    ms = 1_000_000
    due = np.array([0, 10, 20, 30], dtype=np.int64) * ms
    result = LoadResult(
        plan={},
        scheduled_ns=due,
        sent_ns=due + ms,
        answered_ns=np.array([15, 12, 26, 45], dtype=np.int64) * ms,
        codes=np.array([0, 0, 14, 0], dtype=np.int16),
        window_start_ns=10 * ms,
        window_end_ns=40 * ms,
    )
    assert result.requests == 3
    assert result.errors == {"UNAVAILABLE": 1}
    assert result.latencies_us().tolist() == [2_000, 15_000]
    # Answers at 15 and 12 ms are in the window, the one at 45 ms is not: 2 in 30 ms.
    assert result.req_per_s == pytest.approx(2 / 0.03)
    assert result.lags_us().tolist() == [1_000, 1_000, 1_000]


def test_run_load_needs_no_event_loop() -> None:
    with pytest.raises(TargetUnreachable):
        run_load(LoadPlan(target="127.0.0.1:1", requests=[b"x"], connect_timeout_s=0.2))
