"""When to come back: what is refused for a quota says so, at each door in its own way."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiorch_proto.tfserving import serving_pb2
from running_site import encode_values
from secured import DOORS, INFER, SERVICE, serve_secured

from aiorch_server.dataplane import _NamedRefusals
from aiorch_server.errors import AiorchError, QuotaExceeded
from aiorch_server.types import InferenceRequest

PUSHBACK = "grpc-retry-pushback-ms"
PREDICT = "/tensorflow.serving.PredictionService/Predict"
V2 = {"inputs": [{"name": "INPUT0", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]}
MESSAGE = encode_values([1.0, 2.0], "own-one")
#: Once in a hundred seconds: the second of two requests is refused however slow the machine is.
RARELY = {"quotas": [{"tenant": "*", "requests_per_s": 0.01}]}


def encode_predict() -> bytes:
    request = serving_pb2.PredictRequest()
    request.model_spec.name = "own-one"
    tensor = request.inputs["INPUT0"]
    tensor.dtype = 1
    for size in (1, 2):
        tensor.tensor_shape.dim.add(size=size)
    tensor.float_val.extend((1.0, 2.0))
    return bytes(request.SerializeToString())


@pytest.mark.parametrize("door", DOORS)
async def test_a_quota_tells_when_to_come_back(models: Path, door: str) -> None:
    async with serve_secured(models, door, security=RARELY) as site:
        assert (await site.infer("client")).code == "OK"
        timed = [("aiorch-timing", "1")]
        for answer in (
            await site.infer("client"),  # by the pass, where there are any
            await site.infer("client", metadata=timed),
            await site.call(INFER.replace("inference.", "aiorch.v2."), MESSAGE, "client", metadata=timed),
            await site.call(PREDICT, encode_predict(), "client"),
            await site.call(f"{SERVICE}/ModelStreamInfer", MESSAGE, "client", metadata=[("triton_grpc_error", "true")]),
        ):
            assert answer.code == "RESOURCE_EXHAUSTED" and "quota of tenant 'client'" in answer.text
            assert 50_000 < int(answer.trailing[PUSHBACK]) <= 100_000, answer.text


async def test_http_tells_it_too(models: Path) -> None:
    async with serve_secured(models, security=RARELY) as site:
        assert (await site.infer("client")).code == "OK"
        for path, body in (
            ("/v2/models/own-one/infer", V2),
            ("/v1/models/own-one:predict", {"instances": [[1.0, 2.0]]}),
            ("/v2/models/own-one/generate", {"INPUT0": [1.0, 2.0]}),
            ("/v2/models/own-one/generate_stream", {"INPUT0": [1.0, 2.0]}),
        ):
            refused = await site.ask("POST", path, "client", json=body)
            assert refused.status_code == 429, (path, refused.text)
            assert 50 < int(refused.headers["retry-after"]) <= 100, path


def test_naming_the_request_keeps_what_else_an_error_knows() -> None:
    with pytest.raises(QuotaExceeded) as caught, _NamedRefusals(InferenceRequest("m", "", [], id="7")):
        raise QuotaExceeded("too much", 5)
    assert str(caught.value) == "[request id: 7] too much" and caught.value.retry_after_ns == 5


def test_every_error_can_be_restated() -> None:
    class Odd(AiorchError):
        def __init__(self, one: str, *, two: int) -> None:
            super().__init__(f"{one} {two}")
            self.two = two

    cause = ValueError("why")
    odd = Odd("a", two=2)
    odd.__cause__ = cause
    restated = odd.restate("b")
    assert (type(restated), str(restated), restated.two, restated.__cause__) == (Odd, "b", 2, cause)
