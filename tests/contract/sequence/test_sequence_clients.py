"""Sequences through unmodified Triton clients, with both strategies."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from running_site import TIMEOUT_S
from sequence_models import SIGNALS, WAIT, StatefulSite

MODELS = ["oldest", "direct", "oldest_alone", "direct_alone"]
Step = tuple[int, dict[str, Any]]
#: What each client sends, and the sums that come back.
STEPS: list[Step] = [(1, {"sequence_start": True}), (20, {}), (300, {"sequence_end": True})]
TOTALS = [1, 21, 321]


def fill(module: Any, value: int, model: str = "") -> list[Any]:
    shape = [1] if model.endswith("alone") else [1, 1]
    tensor = module.InferInput("value", shape, "INT64")
    tensor.set_data_from_numpy(np.array([value], np.int64).reshape(shape))
    return [tensor]


def total_of(result: Any) -> int:
    return int(result.as_numpy("total").item())


def signals_of(result: Any) -> dict[str, int]:
    return dict(zip(SIGNALS, result.as_numpy("signals").reshape(-1).tolist(), strict=True))


@contextmanager
def open_stream(target: str) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """A streaming client, and how to get its next answer."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def read() -> Any:
        result, error = answers.get(timeout=TIMEOUT_S)
        if error is not None:
            raise error
        return result

    with triton_grpc.InferenceServerClient(target) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        yield client, read
        client.stop_stream()


@pytest.mark.proves("ModelInfer", by="tritonclient.grpc")
@pytest.mark.parametrize("model", MODELS)
def test_grpc(stateful: StatefulSite, model: str) -> None:
    with triton_grpc.InferenceServerClient(stateful.target) as client:
        results = [client.infer(model, fill(triton_grpc, value, model), sequence_id=42, **flags)
                   for value, flags in STEPS]  # fmt: skip
    assert list(map(total_of, results)) == TOTALS
    seen = [signals_of(each) for each in results]
    assert [(each["start"], each["end"], each["ready"], each["corrid"]) for each in seen] == [
        (1, 0, 1, 42), (0, 0, 1, 42), (0, 1, 1, 42),
    ]  # fmt: skip
    response = results[0].get_response()
    assert {output.name for output in response.outputs} == {"total", "signals"}
    assert (response.model_name, response.model_version) == (model, "1")
    assert stateful.count(model) == {"live": 0, "backlog": 0, "waiting": 0}


@pytest.mark.proves("ModelStreamInfer", by="tritonclient.grpc")
@pytest.mark.parametrize("model", MODELS)
def test_grpc_stream(stateful: StatefulSite, model: str) -> None:
    with open_stream(stateful.target) as (client, read):
        for value, flags in STEPS:
            client.async_stream_infer(model, fill(triton_grpc, value, model), sequence_id=43, **flags)
        assert [total_of(read()) for _ in STEPS] == TOTALS


@pytest.mark.proves("ModelInfer", "ModelStreamInfer", by="tritonclient.grpc.aio")
@pytest.mark.parametrize("model", MODELS)
async def test_grpc_aio(stateful: StatefulSite, model: str) -> None:
    async def send() -> AsyncIterator[dict[str, Any]]:
        for value, flags in STEPS:
            inputs = fill(triton_grpc_aio, value, model)
            yield {"model_name": model, "inputs": inputs, "sequence_id": 45, **flags}

    async with triton_grpc_aio.InferenceServerClient(stateful.target) as client:
        totals = []
        for value, flags in STEPS:
            inputs = fill(triton_grpc_aio, value, model)
            totals.append(total_of(await client.infer(model, inputs, sequence_id=44, **flags)))
        assert totals == TOTALS
        streamed = [(total_of(result), error) async for result, error in client.stream_infer(send())]
        assert streamed == [(total, None) for total in TOTALS]


@pytest.mark.proves("ModelInfer", by="tritonclient.http")
@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("model", MODELS)
def test_http(stateful: StatefulSite, model: str, is_binary: bool) -> None:
    with triton_http.InferenceServerClient(stateful.http) as client:
        totals = []
        for value, flags in STEPS:
            (tensor,) = fill(triton_http, value, model)
            tensor.set_data_from_numpy(np.array([value], np.int64).reshape(tensor.shape()), binary_data=is_binary)
            totals.append(total_of(client.infer(model, [tensor], sequence_id=46, **flags)))
    assert totals == TOTALS


@pytest.mark.proves("ModelInfer", by="tritonclient.http.aio")
@pytest.mark.parametrize("model", MODELS)
async def test_http_aio(stateful: StatefulSite, model: str) -> None:
    async with triton_http_aio.InferenceServerClient(stateful.http) as client:
        totals = []
        for value, flags in STEPS:
            inputs = fill(triton_http_aio, value, model)
            totals.append(total_of(await client.infer(model, inputs, sequence_id=47, **flags)))
    assert totals == TOTALS


@pytest.mark.parametrize("model", ["oldest_text", "direct_text"])
@pytest.mark.parametrize("id", ["é", "a" * 128, 123456789, 2**64 - 1])
def test_ids_of_text_models(stateful: StatefulSite, model: str, id: int | str) -> None:
    with triton_http.InferenceServerClient(stateful.http) as client:
        inputs = fill(triton_http, 1)
        result = client.infer(model, inputs, sequence_id=id, sequence_start=True, sequence_end=True)
    assert signals_of(result)["corrid"] == len(str(id).encode())


@pytest.mark.parametrize("model", ["oldest_two", "direct_two"])
async def test_many_sequences_at_once(stateful: StatefulSite, model: str) -> None:
    """More than there are places, a stream each: all come through in order, at one instance, batched with others."""
    n_steps, n_held = 8, 6
    seen: dict[int, list[dict[str, int]]] = {}

    async def follow(client: Any, id: int) -> None:
        async def send() -> AsyncIterator[dict[str, Any]]:
            for step in range(n_steps):
                value = WAIT if step == 0 and id <= n_held else id * 1000 + step
                yield {
                    "model_name": model, "inputs": fill(triton_grpc_aio, value), "sequence_id": id,
                    "sequence_start": step == 0, "sequence_end": step == n_steps - 1,
                }  # fmt: skip

        answers = [each async for each in client.stream_infer(send())]
        assert [error for _, error in answers] == [None] * n_steps
        first = WAIT if id <= n_held else id * 1000
        sums = [first + sum(id * 1000 + each for each in range(1, step + 1)) for step in range(n_steps)]
        assert [total_of(result) for result, _ in answers] == sums
        seen[id] = [signals_of(result) for result, _ in answers]

    async with triton_grpc_aio.InferenceServerClient(stateful.target) as client:
        with stateful.held(model) as release:
            held = [asyncio.create_task(follow(client, id)) for id in range(1, n_held + 1)]
            await asyncio.to_thread(stateful.wait_count, model, live=n_held, backlog=0)
            others = [asyncio.create_task(follow(client, id)) for id in range(n_held + 1, 21)]
            await asyncio.to_thread(stateful.wait_count, model, live=n_held, backlog=14)
            release()
            await asyncio.gather(*held, *others)
    for id, steps in seen.items():
        assert {each["corrid"] for each in steps} == {id}
        assert [each["start"] for each in steps] == [1] + [0] * (n_steps - 1)
        assert [each["end"] for each in steps] == [0] * (n_steps - 1) + [1]
        assert len({each["instance"] for each in steps}) == 1
        if model.startswith("direct"):  # one row of the batch for its whole life
            assert len({each["row"] for each in steps}) == 1
    everything = [each for steps in seen.values() for each in steps]
    assert {each["instance"] for each in everything} == {0, 1}
    assert max(each["rows"] for each in everything) > 1
    assert stateful.count(model) == {"live": 0, "backlog": 0, "waiting": 0}


@pytest.mark.parametrize("model", ["initial_oldest", "initial_direct"])
def test_state_begins_with_a_file(stateful: StatefulSite, model: str) -> None:
    with triton_grpc.InferenceServerClient(stateful.target) as client:
        results = [client.infer(model, fill(triton_grpc, value), sequence_id=5, **flags) for value, flags in STEPS]
        assert list(map(total_of, results)) == [7 + total for total in TOTALS]
        again = client.infer(model, fill(triton_grpc, 1), sequence_id=5, sequence_start=True, sequence_end=True)
        assert total_of(again) == 8


@pytest.mark.parametrize("model", ["growing_oldest", "growing_direct"])
async def test_state_that_grows(stateful: StatefulSite, model: str) -> None:
    """Strings, and states of different sizes at the same time: those never share a batch."""

    async def follow(client: Any, id: str, words: list[str]) -> None:
        for index in range(len(words)):
            tensor = triton_grpc_aio.InferInput("text", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[words[index].encode()]], object))
            result = await client.infer(
                model, [tensor], sequence_id=id, sequence_start=index == 0, sequence_end=index == len(words) - 1
            )
            assert result.as_numpy("all").item().decode() == " ".join(["", *words[: index + 1]])

    async with triton_grpc_aio.InferenceServerClient(stateful.target) as client:
        await asyncio.gather(*(follow(client, f"s{n}", [f"{n}é{each}" for each in range(n)]) for n in range(1, 9)))


def test_direct_waits_for_company(stateful: StatefulSite) -> None:
    """Three of four places make 0.75; less wait for the delay, which is a minute."""
    with triton_grpc.InferenceServerClient(stateful.target) as client:
        answers: queue.Queue[Any] = queue.Queue()
        flags = {"sequence_start": True, "sequence_end": True}

        def keep(result: Any, error: Any) -> None:
            answers.put((result, error))

        for id in (1, 2, 3):
            inputs = fill(triton_grpc, id)
            client.async_infer("patient", inputs, keep, sequence_id=id, **flags)
            if id < 3:
                stateful.wait_count("patient", live=id, waiting=id)
        found = [answers.get(timeout=TIMEOUT_S) for _ in range(3)]
        assert [error for _, error in found] == [None] * 3
        assert {signals_of(result)["rows"] for result, _ in found} == {3}
        # where nobody else comes, the delay ends it
        assert signals_of(client.infer("brief", fill(triton_grpc, 1), sequence_id=1, **flags))["rows"] == 1


def test_absent_rows_are_not_ready(stateful: StatefulSite) -> None:
    """The second place speaks, the first one is silent: its row is there, filled, and its state stays."""
    with triton_grpc.InferenceServerClient(stateful.target) as client:
        for id in (1, 2):
            client.infer("direct", fill(triton_grpc, 10 * id), sequence_id=id, sequence_start=True)
        second = client.infer("direct", fill(triton_grpc, 1), sequence_id=2, sequence_end=True)
        assert signals_of(second) | {"start": 0, "end": 1, "ready": 1} == signals_of(second)
        assert (signals_of(second)["row"], signals_of(second)["rows"], total_of(second)) == (1, 2, 21)
        assert total_of(client.infer("direct", fill(triton_grpc, 1), sequence_id=1, sequence_end=True)) == 11


def test_large_requests_of_a_stream_keep_their_order(stateful: StatefulSite) -> None:
    """A large one is unpacked on another thread; the small ones behind it must not overtake it."""
    with open_stream(stateful.target) as (client, read):
        words = [["x" * 200_000], ["small"], ["y" * 100_000, "z"], ["end"]]
        for index, given in enumerate(words):
            tensor = triton_grpc.InferInput("text", [1, len(given)], "BYTES")
            tensor.set_data_from_numpy(np.array([[each.encode() for each in given]], object))
            client.async_stream_infer(
                "growing_oldest", [tensor], sequence_id=77, sequence_start=index == 0, sequence_end=index == 3
            )
        said: list[str] = [""]
        for given in words:
            said += given
            assert read().as_numpy("all").item().decode() == " ".join(said)


async def test_answers_in_order(stateful: StatefulSite) -> None:
    async with triton_grpc_aio.InferenceServerClient(stateful.target) as client:
        flags = {"sequence_start": True, "sequence_end": True}
        calls = [client.infer("ordered", fill(triton_grpc_aio, id), sequence_id=id, **flags) for id in range(1, 21)]
        assert [total_of(each) for each in await asyncio.gather(*calls)] == list(range(1, 21))
