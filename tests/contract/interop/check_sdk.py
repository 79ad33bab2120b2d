"""Our Python SDK against any running server of the V2 protocol, by hand: Triton's binary is too large for the suite.

    python tests/contract/interop/check_sdk.py HOST:PORT MODEL

MODEL echoes FP32 rows of 4 from INPUT0 to OUTPUT0, as the comparison's ``identity_fp32`` does. Exits with 0 when all
that it prints is right.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import numpy as np
from aiorch_client import AsyncClient, Client, InferRequest, NotFoundError, RequestError


def rows(value: float, count: int = 1) -> np.ndarray:
    return np.full((count, 4), value, np.float32)


def check_blocking(target: str, model: str) -> None:
    with Client(target) as client:
        assert client.is_live() and client.is_ready() and client.is_model_ready(model)
        server = client.server_metadata()
        print(f"server {server.name} {server.version}: {', '.join(server.extensions)}")
        metadata = client.metadata(model)
        assert [(tensor.name, tensor.datatype) for tensor in metadata.inputs] == [("INPUT0", "FP32")], metadata
        assert client.config(model)["name"] == model
        assert model in [entry.name for entry in client.index()]
        for count in (1, 3, 64):
            np.testing.assert_array_equal(client.infer(model, rows(count, count))["OUTPUT0"], rows(count, count))
        assert client.infer(model, rows(1), request_id="seven").id == "seven"
        for wrong in ("nobody", ""):
            try:
                client.infer(wrong, rows(1))
            except (NotFoundError, RequestError) as error:
                print(f"unknown model {wrong!r}: {type(error).__name__}: {error}")
            else:
                raise AssertionError(f"model {wrong!r} answered")

        def requests() -> Iterator[InferRequest]:
            for value in range(20):
                yield InferRequest(model, rows(value), request_id=str(value))

        with_stream = list(client.stream(requests()))
        assert len(with_stream) == 20
        for value, result in enumerate(with_stream):
            np.testing.assert_array_equal(result["OUTPUT0"], rows(value))
        assert client.statistics(model)[0].name == model


async def check_asyncio(target: str, model: str) -> None:
    async with AsyncClient(target) as client:
        answers = await asyncio.gather(*(client.infer(model, rows(value)) for value in range(200)))
        for value, answer in enumerate(answers):
            np.testing.assert_array_equal(answer["OUTPUT0"], rows(value))


def main() -> None:
    target, model = sys.argv[1:]
    check_blocking(target, model)
    asyncio.run(check_asyncio(target, model))
    print("all right")


if __name__ == "__main__":
    main()
