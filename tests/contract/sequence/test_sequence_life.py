"""What becomes of sequences when something goes wrong: nobody waits for ever, no place is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from running_site import TIMEOUT_S
from sequence_models import DIE, FAIL, WAIT, StatefulSite, write_tally
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

BOTH = pytest.mark.parametrize("model", ["oldest", "direct"])
DIRECT = "direct { max_queue_delay_microseconds: 0 }"


class Speaker:
    """Sends requests of one sequence, each a call of its own; calls leave in the order in which they are made."""

    def __init__(self, stub: Any, model: str, id: int) -> None:
        self.stub, self.model, self.id = stub, model, id

    def say(
        self, value: int, *, start: bool = False, end: bool = False, timeout_s: float = TIMEOUT_S, **extra: int
    ) -> Any:
        request = pb.ModelInferRequest(model_name=self.model)
        request.inputs.add(name="value", datatype="INT64", shape=[1, 1])
        request.raw_input_contents.append(np.array([value], np.int64).tobytes())
        request.parameters["sequence_id"].int64_param = self.id
        request.parameters["sequence_start"].bool_param = start
        request.parameters["sequence_end"].bool_param = end
        for name, number in extra.items():
            request.parameters[name].int64_param = number
        return self.stub.ModelInfer(request, timeout=timeout_s)

    async def total(self, value: int, **options: Any) -> int:
        return read_total(await self.say(value, **options))


def read_total(answer: Any) -> int:
    names = [output.name for output in answer.outputs]
    return int(np.frombuffer(answer.raw_output_contents[names.index("total")], np.int64).item())


async def code_of(call: Any) -> tuple[str, str]:
    """The status of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code().name, str(caught.value.details())


@pytest.fixture
async def stub(stateful: StatefulSite) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(stateful.target) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture(autouse=True)
def nothing_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "stateful" in request.fixturenames:
        site = request.getfixturevalue("stateful")
        for model in ("oldest", "direct"):
            site.wait_count(model, live=0, backlog=0, waiting=0)


async def wait_count(site: StatefulSite, model: str, **wanted: int) -> None:
    await asyncio.to_thread(site.wait_count, model, **wanted)


@BOTH
async def test_cancelled_while_it_waits(stateful: StatefulSite, stub: Any, model: str) -> None:
    """What came before it is answered; what comes after it is told, unless it starts anew."""
    speaker = Speaker(stub, model, 1)
    with stateful.held(model) as release:
        first = speaker.say(WAIT, start=True)
        await wait_count(stateful, model, live=1, waiting=0)
        calls = [first]
        for waiting, (value, flags) in enumerate(
            [(1, {}), (2, {}), (3, {}), (10, {"start": True}), (1, {"end": True})]
        ):
            calls.append(speaker.say(value, **flags))
            await wait_count(stateful, model, waiting=waiting + 1)
        calls[2].cancel()
        code, text = await code_of(calls[3])
        assert code == "CANCELLED" and "begin again with START" in text
        await wait_count(stateful, model, waiting=3)
        release()
        assert [read_total(await call) for call in (*calls[:2], *calls[4:])] == [WAIT, WAIT + 1, 10, 11]


@BOTH
async def test_cancelled_while_it_runs(stateful: StatefulSite, stub: Any, model: str) -> None:
    """The sequence ends when the model is done; its place is free then."""
    speaker = Speaker(stub, model, 1)
    with stateful.held(model) as release:
        running = speaker.say(WAIT, start=True)
        await wait_count(stateful, model, live=1, waiting=0)
        behind = speaker.say(1)
        await wait_count(stateful, model, waiting=1)
        running.cancel()
        assert (await code_of(behind))[0] == "CANCELLED"
        assert "must specify the START flag" in (await code_of(speaker.say(2)))[1]
        assert stateful.count(model)["live"] == 1
        again = speaker.say(7, start=True, end=True)  # a new sequence of that name does not wait for the old one
        release()
        assert read_total(await again) == 7


@BOTH
async def test_deadline_while_it_waits(stateful: StatefulSite, stub: Any, model: str) -> None:
    speaker = Speaker(stub, model, 1)
    with stateful.held(model) as release:
        running = speaker.say(WAIT, start=True)
        await wait_count(stateful, model, live=1, waiting=0)
        assert (await code_of(speaker.say(1, timeout_s=0.05)))[0] == "DEADLINE_EXCEEDED"
        await wait_count(stateful, model, waiting=0)
        assert "must specify the START flag" in (await code_of(speaker.say(2)))[1]
        release()
        assert read_total(await running) == WAIT


@BOTH
async def test_timeout_in_the_backlog(stateful: StatefulSite, stub: Any, model: str) -> None:
    """The request's own timeout, in microseconds."""
    with stateful.held(model) as release:
        running = [Speaker(stub, model, id).say(WAIT, start=True, end=True) for id in range(1, 5)]
        await wait_count(stateful, model, live=4)
        late = Speaker(stub, model, 5).say(1, start=True, timeout=20000)
        assert await code_of(late) == ("UNAVAILABLE", "[request id: <id_unknown>] Request timeout expired")
        await wait_count(stateful, model, backlog=0)
        release()
        assert [read_total(await call) for call in running] == [WAIT] * 4


@BOTH
async def test_a_failed_request_leaves_the_state(stateful: StatefulSite, stub: Any, model: str) -> None:
    """It can be sent again; batch-mates are not harmed."""
    speaker, other = Speaker(stub, model, 1), Speaker(stub, model, 2)
    with stateful.held(model) as release:
        first = speaker.say(WAIT, start=True)
        await wait_count(stateful, model, live=1, waiting=0)
        calls = [speaker.say(FAIL), other.say(5, start=True)]
        await wait_count(stateful, model, live=2)
        release()
        assert read_total(await first) == WAIT
        code, text = await code_of(calls[0])
        assert code == "INTERNAL" and "asked to fail" in text
        assert read_total(await calls[1]) == 5
    assert await speaker.total(1) == WAIT + 1
    assert await speaker.total(1, end=True) == WAIT + 2
    assert await other.total(1, end=True) == 6


@BOTH
async def test_a_batch_fails_member_by_member(stateful: StatefulSite, stub: Any, model: str) -> None:
    speakers = [Speaker(stub, model, id) for id in range(1, 5)]
    for speaker in speakers:
        assert await speaker.total(speaker.id, start=True) == speaker.id
    with stateful.held(model) as release:
        running = speakers[0].say(WAIT)
        await asyncio.to_thread(wait_running, stateful, model, speakers[0].id)
        calls = [speaker.say(FAIL if speaker.id == 3 else 10) for speaker in speakers[1:]]
        await asyncio.to_thread(wait_queued, stateful, model, 3)
        release()
        assert read_total(await running) == 1 + WAIT
        assert read_total(await calls[0]) == 12
        assert (await code_of(calls[1]))[0] == "INTERNAL"
        assert read_total(await calls[2]) == 14
    assert [await speaker.total(100, end=True) for speaker in speakers] == [101 + WAIT, 112, 103, 114]


def wait_running(site: StatefulSite, model: str, id: int) -> None:
    site.wait_for(lambda: site.table(model)._known[id].running is not None)


def wait_queued(site: StatefulSite, model: str, count: int) -> None:
    """So many sequences have brought something that waits: in the table, or in the instance's queue."""
    scheduler = site.servable(model).scheduler
    site.wait_for(lambda: site.table(model).waiting_requests + scheduler.pending == count)


@BOTH
async def test_a_failed_start(stateful: StatefulSite, stub: Any, model: str) -> None:
    speaker = Speaker(stub, model, 1)
    assert (await code_of(speaker.say(FAIL, start=True)))[0] == "INTERNAL"
    assert "must specify the START flag" in (await code_of(speaker.say(1)))[1]


@BOTH
async def test_start_again(stateful: StatefulSite, stub: Any, model: str) -> None:
    speaker = Speaker(stub, model, 1)
    assert [await speaker.total(5, start=True), await speaker.total(5)] == [5, 10]
    assert [await speaker.total(1, start=True), await speaker.total(1, end=True)] == [1, 2]


@BOTH
async def test_the_connection_is_lost(stateful: StatefulSite, stub: Any, model: str) -> None:
    with stateful.held(model):
        async with grpc.aio.insecure_channel(stateful.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            speaker = Speaker(service_pb2_grpc.GRPCInferenceServiceStub(channel), model, 9)
            calls = [speaker.say(WAIT, start=True)]
            await wait_count(stateful, model, live=1, waiting=0)
            calls += [speaker.say(1), speaker.say(2)]
            await wait_count(stateful, model, waiting=2)
        await wait_count(stateful, model, waiting=0)
        assert all(call.cancelled() for call in calls)


@pytest.mark.parametrize("strategy", ["oldest { max_candidate_sequences: 1 }", DIRECT])
async def test_idle_sequences_are_dropped(own_repository: Path, strategy: str) -> None:
    """Their place goes to who waits, and what comes late has no sequence any more."""
    write_tally(own_repository, "brief", rows="1", idle_us="60000", strategy=strategy)
    site = StatefulSite(own_repository)
    try:
        async with grpc.aio.insecure_channel(site.target) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            silent, next_one = Speaker(stub, "brief", 1), Speaker(stub, "brief", 2)
            assert await silent.total(1, start=True) == 1
            assert await next_one.total(2, start=True) == 2  # waited until the first one's time was over
            assert "must specify the START flag" in (await code_of(silent.say(1)))[1]
            await wait_count(site, "brief", live=0)
            with site.held("brief") as release:  # who runs for long is not idle
                running = next_one.say(WAIT, start=True)
                await asyncio.sleep(0.15)
                release()
                assert read_total(await running) == WAIT
            assert await next_one.total(1, end=True) == WAIT + 1
    finally:
        site.close()


async def test_bounds(own_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiorch_server.scheduling.sequence.MAX_BACKLOG", 2)
    monkeypatch.setattr("aiorch_server.scheduling.sequence.MAX_WAITING", 3)
    write_tally(own_repository, "small", rows="1", strategy="oldest { max_candidate_sequences: 1 }")
    site = StatefulSite(own_repository)
    full = "UNAVAILABLE", "[request id: <id_unknown>] Exceeds maximum queue size"
    try:
        async with grpc.aio.insecure_channel(site.target) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            one, *others = [Speaker(stub, "small", id) for id in range(1, 5)]
            with site.held("small") as release:
                calls = [one.say(WAIT, start=True)]
                await wait_count(site, "small", live=1, waiting=0)
                calls += [one.say(1), one.say(1), one.say(1)]
                await wait_count(site, "small", waiting=3)
                assert await code_of(one.say(1)) == full
                calls += [other.say(5, start=True, end=True) for other in others[:2]]
                await wait_count(site, "small", backlog=2)
                assert await code_of(others[2].say(5, start=True)) == full
                assert await code_of(others[2].say(5)) != full
                release()
                assert read_total(await calls[1]) == WAIT + 1
                calls.append(one.say(1, end=True))  # there is room again
                await wait_count(site, "small", live=0, backlog=0)
            assert [read_total(await call) for call in calls[:4]] == [WAIT, WAIT + 1, WAIT + 2, WAIT + 3]
            assert [read_total(await call) for call in calls[4:6]] == [5, 5]
            assert read_total(await calls[6]) == WAIT + 4
    finally:
        site.close()


@pytest.mark.parametrize("strategy", ["oldest { max_candidate_sequences: 2 }", DIRECT])
async def test_unload_serves_what_waits(own_repository: Path, strategy: str) -> None:
    """Sequences whose clients are silent do not hold it up; nothing follows them."""
    write_tally(own_repository, "leaving", rows="2", strategy=strategy)
    site = StatefulSite(own_repository, lifecycle={"control_mode": "explicit", "load_models": ["leaving"]})
    servable = site.servable("leaving")
    try:
        async with grpc.aio.insecure_channel(site.target) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            silent, busy, waiting = [Speaker(stub, "leaving", id) for id in (1, 2, 3)]
            assert await silent.total(1, start=True) == 1
            with site.held("leaving") as release:
                calls = [busy.say(WAIT, start=True)]
                await wait_count(site, "leaving", live=2, waiting=0)
                calls += [busy.say(1), waiting.say(7, start=True)]
                await wait_count(site, "leaving", waiting=2, backlog=1)
                unload = stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="leaving"))
                await asyncio.to_thread(site.wait_for, lambda: not servable.is_open)
                assert site.count("leaving")["backlog"] == 0  # the silent one gave its place away
                code, text = await code_of(silent.say(1))
                assert code in ("UNAVAILABLE", "NOT_FOUND") and "leaving" in text
                release()
            assert [read_total(await call) for call in calls] == [WAIT, WAIT + 1, 7]
            await unload
    finally:
        site.close()


async def test_unload_serves_what_waits_for_company(own_repository: Path) -> None:
    strategy = "direct { max_queue_delay_microseconds: 500000 minimum_slot_utilization: 1 }"
    write_tally(own_repository, "lonely", rows="2", strategy=strategy)
    control = {"control_mode": "explicit", "load_models": ["lonely"]}
    site = StatefulSite(own_repository, lifecycle=control)
    try:
        async with grpc.aio.insecure_channel(site.target) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            call = Speaker(stub, "lonely", 1).say(7, start=True)
            await wait_count(site, "lonely", live=1, waiting=1)
            await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="lonely"))
            assert read_total(await call) == 7
    finally:
        site.close()


@pytest.mark.parametrize("strategy", ["oldest { max_candidate_sequences: 2 }", DIRECT])
async def test_stop_without_grace(own_repository: Path, strategy: str) -> None:
    write_tally(own_repository, "stopped", rows="1", strategy=strategy)
    site = StatefulSite(own_repository)
    async with grpc.aio.insecure_channel(site.target) as channel:
        speakers = [Speaker(service_pb2_grpc.GRPCInferenceServiceStub(channel), "stopped", id) for id in (1, 2, 3)]
        with site.held("stopped") as release:
            running = speakers[0].say(WAIT, start=True)
            await wait_count(site, "stopped", live=1, waiting=0)
            calls = [running, speakers[0].say(1), *(each.say(1, start=True) for each in speakers[1:])]
            await asyncio.to_thread(wait_queued, site, "stopped", 3)
            stopping = site.begin_stop(0.2)
            codes = await asyncio.wait_for(asyncio.gather(*map(code_of, calls[1:])), TIMEOUT_S)
            assert {code for code, _ in codes} == {"UNAVAILABLE"}
            release()
            await asyncio.wrap_future(stopping)
        assert (await asyncio.gather(*calls, return_exceptions=True)) is not None
    site.close()


@pytest.mark.parametrize("strategy", ["oldest { max_candidate_sequences: 2 }", DIRECT])
async def test_an_instance_dies(own_repository: Path, strategy: str) -> None:
    """Its sequences are told; those of the other instance, and new ones, go on."""
    write_tally(own_repository, "mortal", rows="2", instances="2", strategy=strategy)
    site = StatefulSite(own_repository)
    try:
        async with grpc.aio.insecure_channel(site.target) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            speakers = [Speaker(stub, "mortal", id) for id in (1, 2, 3, 4)]
            for speaker in speakers:  # 1 and 3 at the first instance, 2 and 4 at the second
                assert await speaker.total(speaker.id, start=True) == speaker.id
            assert (await code_of(speakers[0].say(DIE)))[0] == "INTERNAL"
            await asyncio.to_thread(site.wait_for, lambda: site.servable("mortal").instances.alive == 1)
            code, text = await code_of(speakers[2].say(1))
            assert code == "UNAVAILABLE" and "sequence 3 of model 'mortal' is lost" in text
            assert "must specify the START flag" in (await code_of(speakers[2].say(1)))[1]
            assert [await each.total(1, end=True) for each in (speakers[1], speakers[3])] == [3, 5]
            assert [await each.total(1, start=True) for each in (speakers[0], speakers[2])] == [1, 1]
    finally:
        site.close()


@BOTH
async def test_statistics(own_repository: Path, model: str) -> None:
    """Members are counted, not the rows that were filled for the absent."""
    write_tally(own_repository, model, **({"strategy": DIRECT} if model == "direct" else {}))
    site = StatefulSite(own_repository)
    try:
        async with grpc.aio.insecure_channel(site.target) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            speakers = [Speaker(stub, model, id) for id in (1, 2, 3)]
            await asyncio.gather(*(speaker.total(1, start=True) for speaker in speakers))
            assert await speakers[2].total(1, end=True) == 2
            await code_of(speakers[0].say(FAIL))
            (found,) = (await stub.ModelStatistics(pb.ModelStatisticsRequest(name=model))).model_stats
        assert (found.inference_count, found.inference_stats.success.count, found.inference_stats.fail.count) == (
            4,
            4,
            1,
        )
        stats = found.inference_stats
        assert stats.compute_infer.count == stats.compute_input.count == stats.compute_output.count == 4
        assert 0 < stats.compute_infer.ns < stats.success.ns
    finally:
        site.close()
