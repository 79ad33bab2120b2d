"""Decoupled models over ModelStreamInfer, with NVIDIA's clients and with bare messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from aiorch_proto.v2 import inference_pb2 as pb

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
