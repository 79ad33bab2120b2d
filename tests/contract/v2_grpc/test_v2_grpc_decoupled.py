"""Decoupled models over ModelStreamInfer, with NVIDIA's clients and with bare messages."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from aiorch_proto.v2 import inference_pb2 as pb
from tritonclient.utils import InferenceServerException

DEADLINE_S = 20.0


@pytest.fixture
def site(decoupled_site: SimpleNamespace) -> SimpleNamespace:
    return decoupled_site


def ask(number: int, *, model: str = "count", id: str = "", **parameters: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, id=id)
    request.inputs.add(name="N", datatype="INT32", shape=[1, 1])
    request.raw_input_contents.append(np.array([number], np.int32).tobytes())
    for name, value in parameters.items():
        if isinstance(value, bool):
            request.parameters[name].bool_param = value
        else:
            request.parameters[name].int64_param = value
    return request


class Stream:
    """One open ModelStreamInfer."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def send(self, *requests: pb.ModelInferRequest) -> None:
        for request in requests:
            await self.call.write(request)

    async def read(self) -> tuple[str, str, int | None, bool]:
        """Id, error, value and whether it is final."""
        message = await asyncio.wait_for(self.call.read(), DEADLINE_S)
        assert message is not grpc.aio.EOF
        answer = message.infer_response
        value = int(np.frombuffer(answer.raw_output_contents[0], np.int32)[0]) if answer.raw_output_contents else None
        return answer.id, message.error_message, value, answer.parameters["triton_final_response"].bool_param

    async def end(self) -> None:
        await self.call.done_writing()
        assert await asyncio.wait_for(self.call.read(), DEADLINE_S) is grpc.aio.EOF
        assert await self.call.code() is grpc.StatusCode.OK


@asynccontextmanager
async def open_stream(site: SimpleNamespace, **options: Any) -> AsyncIterator[Stream]:
    call = site.stub.ModelStreamInfer(**options)
    try:
        yield Stream(call)
    finally:
        call.cancel()


async def test_any_number_of_answers_and_the_end_of_each(site: SimpleNamespace) -> None:
    async with open_stream(site) as stream:
        await stream.send(ask(3, id="a", triton_enable_empty_final_response=True))
        assert [await stream.read() for _ in range(4)] == [
            ("a", "", 0, False),
            ("a", "", 1, False),
            ("a", "", 2, False),
            ("a", "", None, True),
        ]
        await stream.send(ask(2, id="b"))  # the empty last answer is only for those who ask
        assert [await stream.read() for _ in range(2)] == [("b", "", 0, False), ("b", "", 1, False)]
        await stream.send(ask(2, id="c", final=True, triton_enable_empty_final_response=True))
        assert [await stream.read() for _ in range(2)] == [("c", "", 0, False), ("c", "", 1, True)]
        await stream.send(ask(0, id="d", triton_enable_empty_final_response=True))
        assert await stream.read() == ("d", "", None, True)
        await stream.end()


async def test_ordinary_answers_keep_their_order_beside_decoupled_ones(site: SimpleNamespace) -> None:
    async with open_stream(site) as stream:
        await stream.send(
            ask(2, id="open", thread=True, gate=True),
            *(ask(number, model="plain", id=f"p{number}") for number in range(20)),
        )
        answers = [await stream.read() for _ in range(21)]
        ordinary = [answer for answer in answers if answer[0] != "open"]
        assert ordinary == [(f"p{number}", "", number, True) for number in range(20)]
        assert [answer for answer in answers if answer[0] == "open"] == [("open", "", 0, False)]
        site.backend.gate.set()  # the open one has held up nobody
        assert await stream.read() == ("open", "", 1, False)
        await stream.end()


async def test_errors_in_the_midst_and_at_the_end(site: SimpleNamespace) -> None:
    async with open_stream(site) as stream:
        await stream.send(ask(3, id="a", error_at=1))
        assert [await stream.read() for _ in range(3)] == [
            ("a", "", 0, False),
            ("a", "no 1 today", None, False),
            ("a", "", 2, False),
        ]
        await stream.send(ask(3, id="b", fail_at=1))
        assert await stream.read() == ("b", "", 0, False)
        _, text, value, is_final = await stream.read()
        assert "it ends at 1" in text and value is None and is_final
        await stream.send(ask(1, id="c", **{"raise": True}))
        id, text, _, is_final = await stream.read()
        assert (id, is_final) == ("c", True) and "ValueError: the model said no" in text
        await stream.send(ask(1, id="d", triton_bad=1))
        id, text, _, is_final = await stream.read()
        assert (id, is_final) == ("d", True) and "[request id: d] parameter 'triton_bad' is refused" in text
        await stream.end()


async def test_a_request_that_the_model_drops_fails(site: SimpleNamespace) -> None:
    async with open_stream(site) as stream:
        await stream.send(ask(3, id="a", drop_at=2))
        assert [await stream.read() for _ in range(2)] == [("a", "", 0, False), ("a", "", 1, False)]
        id, text, _, is_final = await stream.read()
        assert (id, is_final) == ("a", True) and "without a final answer" in text
        await stream.end()


async def test_nothing_can_be_sent_after_the_end(site: SimpleNamespace) -> None:
    async with open_stream(site) as stream:
        await stream.send(ask(1, id="a", again=True, triton_enable_empty_final_response=True))
        assert [await stream.read() for _ in range(2)] == [("a", "", 0, False), ("a", "", None, True)]
        await stream.send(ask(1, id="b"))
        assert (await stream.read())[0] == "b"
        assert site.backend.refusals == ["Unable to send response. Response sender has been closed."]
        await stream.end()


async def test_the_first_error_closes_the_stream_for_who_asks(site: SimpleNamespace) -> None:
    async with open_stream(site, metadata=(("triton_grpc_error", "true"),)) as stream:
        await stream.send(ask(3, id="a", error_at=1))
        assert (await stream.read())[2] == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            while True:
                await stream.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and caught.value.details() == "no 1 today"


async def test_unary_calls_are_refused_in_tritons_words(site: SimpleNamespace) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await site.stub.ModelInfer(ask(1, id="a"))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert caught.value.details() == "ModelInfer RPC doesn't support models with decoupled transaction policy"
    assert not site.backend.n_sent


async def test_the_model_sees_that_its_caller_left(site: SimpleNamespace) -> None:
    async with open_stream(site) as stream:
        await stream.send(ask(2, id="a", hold=True))
        assert await stream.read() == ("a", "", -1, False)
        (held,) = site.backend.held
        assert not held.is_cancelled()
        stream.call.cancel()
        async with asyncio.timeout(DEADLINE_S):
            while not held.is_cancelled():
                await asyncio.sleep(0.001)
    held.send({"I": np.array([[5]], np.int32)})  # is dropped
    held.finish()
    async with asyncio.timeout(DEADLINE_S):
        while site.manager.find("count").leases:
            await asyncio.sleep(0.001)
    statistics = site.manager.find("count").statistics()
    assert statistics.failures["CANCELED"] == 1 and statistics.responses["1"].cancel.count == 1


async def test_a_deadline_ends_the_stream_and_cancels_the_request(site: SimpleNamespace) -> None:
    async with open_stream(site, timeout=0.5) as stream:
        await stream.send(ask(2, id="a", hold=True))
        assert await stream.read() == ("a", "", -1, False)
        assert await stream.call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(DEADLINE_S):
            while not site.backend.held[0].is_cancelled():
                await asyncio.sleep(0.001)


async def test_a_slow_client_slows_the_sender(site: SimpleNamespace) -> None:
    wanted = 16_000  # 32 MB: gRPC's client may open its window to 16 MB, and the system keeps some more
    async with open_stream(site) as stream:
        await stream.send(ask(wanted, id="x" * 2000, thread=True))
        await stream.read()
        async with asyncio.timeout(DEADLINE_S):
            before = -1
            while before != site.backend.n_sent:  # until it stands still
                before = site.backend.n_sent
                await asyncio.sleep(0.2)
        assert site.backend.n_sent < wanted, "everything was sent to a client that reads nothing"
        values = [(await stream.read())[2] for _ in range(wanted - 1)]
        assert values == list(range(1, wanted))
        await stream.end()


async def test_unloading_waits_for_streams_and_then_ends_them(site: SimpleNamespace) -> None:
    async with open_stream(site) as stream:
        await stream.send(ask(2, id="a", hold=True))
        assert await stream.read() == ("a", "", -1, False)
        unloading = asyncio.create_task(site.manager.unload("count"))
        id, text, _, is_final = await stream.read()  # after the drain's time
        assert (id, is_final) == ("a", True) and text
        await asyncio.wait_for(unloading, DEADLINE_S)
        with pytest.raises(Exception, match=r"Response sender has been closed"):
            site.backend.held[0].send({"I": np.array([[5]], np.int32)})
        await stream.send(ask(1, id="b"))
        assert "count" in (await stream.read())[1]
        await stream.end()


async def test_streams_that_end_in_time_are_not_harmed_by_an_unload(site: SimpleNamespace) -> None:
    site.manager._drain_timeout_s = 20.0
    for model in site.manager._models.values():
        model._drain_timeout_s = 20.0
    async with open_stream(site) as stream:
        await stream.send(ask(2, id="a", thread=True, gate=True))
        assert await stream.read() == ("a", "", 0, False)
        unloading = asyncio.create_task(site.manager.unload("count"))
        while site.manager.is_ready("count"):
            await asyncio.sleep(0.001)
        site.backend.gate.set()
        assert await stream.read() == ("a", "", 1, False)
        await asyncio.wait_for(unloading, DEADLINE_S)
        await stream.end()


async def test_an_instance_that_dies_ends_its_open_streams(site: SimpleNamespace) -> None:
    async with open_stream(site) as stream:
        await stream.send(ask(2, id="a", hold=True))
        assert await stream.read() == ("a", "", -1, False)
        await stream.send(ask(1, id="b", die=True))
        texts = dict([(await stream.read())[:2] for _ in range(2)])
        assert texts == dict.fromkeys("ab", "model 'count' failed: SystemExit: the model left")
        await stream.end()


async def test_statistics_count_answers_by_their_place(site: SimpleNamespace) -> None:
    async with open_stream(site) as stream:
        await stream.send(ask(2, id="a", triton_enable_empty_final_response=True))
        for _ in range(3):
            await stream.read()
        await stream.end()
    answer = await site.stub.ModelStatistics(pb.ModelStatisticsRequest(name="count"))
    (model,) = answer.model_stats
    assert (model.inference_count, model.execution_count, model.inference_stats.success.count) == (1, 1, 1)
    assert [(batch.batch_size, batch.compute_infer.count) for batch in model.batch_stats] == [(1, 1)]
    assert sorted(model.response_stats) == ["0", "1", "2"]
    assert [model.response_stats[place].success.count for place in "012"] == [1, 1, 0]
    assert model.response_stats["2"].empty_response.count == 1
    first = site.manager.find("count").statistics().first_response
    assert first is not None and sum(first.counts) == 1 and first.sum_s > 0


@pytest.mark.proves("ModelStreamInfer", by="tritonclient.grpc*")
async def test_tritons_own_clients_stream(site: SimpleNamespace) -> None:
    def collect(wanted: int) -> list[tuple[str, int | None]]:
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        with triton.InferenceServerClient(site.url) as client:
            client.start_stream(callback=lambda result, error: answers.put((result, error)))
            tensor = triton.InferInput("N", [1, 1], "INT32")
            tensor.set_data_from_numpy(np.array([[wanted]], np.int32))
            client.async_stream_infer("count", [tensor], request_id="7", enable_empty_final_response=True)
            found = []
            while True:
                result, error = answers.get(timeout=DEADLINE_S)
                assert error is None
                response = result.get_response()
                value = result.as_numpy("I")
                found.append((response.id, None if value is None else int(value[0, 0])))
                if response.parameters["triton_final_response"].bool_param:
                    client.stop_stream()
                    return found

    assert await asyncio.to_thread(collect, 3) == [("7", 0), ("7", 1), ("7", 2), ("7", None)]

    async def requests() -> AsyncIterator[dict[str, Any]]:
        tensor = triton.InferInput("N", [1, 1], "INT32")
        tensor.set_data_from_numpy(np.array([[2]], np.int32))
        yield {"model_name": "count", "inputs": [tensor], "request_id": "8", "parameters": {"fail_at": 1}}

    async with triton_aio.InferenceServerClient(site.url) as client:
        found = [answer async for answer in client.stream_infer(requests())]
    assert [None if result is None else int(result.as_numpy("I")[0, 0]) for result, _ in found] == [0, None]
    assert isinstance(found[1][1], InferenceServerException) and "it ends at 1" in str(found[1][1])
