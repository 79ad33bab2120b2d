"""The memory that small messages may take together, over planes in memory."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiorch_proto.tfserving import core_pb2
from aiorch_proto.tfserving import serving_pb2 as pb

from aiorch_server.errors import CapacityError, PayloadTooLarge
from aiorch_server.frontends.tfserving import service
from aiorch_server.frontends.tfserving.service import ServingServicer
from aiorch_server.frontends.unpacking import UnpackBudget
from aiorch_server.types import DataType, InferenceRequest, InferenceResponse, ModelSignature, TensorSpec

CONTEXT = SimpleNamespace(time_remaining=lambda: None)
ROWS = 1000


class GatedPlane:
    """Echoes once the gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.entered = asyncio.Event()

    async def infer(self, request: InferenceRequest, *, deadline_ns: int = 0) -> InferenceResponse:
        self.entered.set()
        await self.gate.wait()
        return InferenceResponse(request.model_name, "1", request.inputs)


class OneModel:
    async def bring(self, name: str, version: str = "", *, deadline_ns: int = 0) -> None:
        pass

    def foresee(self, name: str, version: str = "") -> tuple[int, ModelSignature]:
        spec = TensorSpec("x", DataType.FP64, (-1,))
        return 1, ModelSignature((spec,), (spec,))


def zeros(rows: int) -> pb.PredictRequest:
    proto = core_pb2.TensorProto(dtype=core_pb2.DT_DOUBLE, tensor_shape={"dim": [{"size": rows}]})
    return pb.PredictRequest(model_spec={"name": "m"}, inputs={"x": proto})


@pytest.fixture
def plane() -> GatedPlane:
    return GatedPlane()


def make_servicer(plane: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[ServingServicer, UnpackBudget]:
    budget = UnpackBudget(ROWS * 8 + 100, patience_s=0.05)
    monkeypatch.setattr(service, "UnpackBudget", lambda: budget)
    return ServingServicer(plane, OneModel(), max_tensor_bytes=ROWS * 8), budget  # type: ignore[arg-type]


async def test_expanded_tensors_share_a_budget(plane: GatedPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    servicer, budget = make_servicer(plane, monkeypatch)
    first = asyncio.create_task(servicer.Predict(zeros(ROWS), CONTEXT))
    await asyncio.wait_for(plane.entered.wait(), 10)
    assert budget.reserved_bytes == ROWS * 8 - zeros(ROWS).ByteSize()
    with pytest.raises(CapacityError, match="memory there is for expanding tensors"):
        await servicer.Predict(zeros(ROWS), CONTEXT)
    plane.gate.set()
    assert len((await first).outputs["x"].double_val) == ROWS
    assert budget.reserved_bytes == 0


async def test_a_cancelled_request_gives_its_share_back(plane: GatedPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    servicer, budget = make_servicer(plane, monkeypatch)
    call = asyncio.create_task(servicer.Predict(zeros(ROWS), CONTEXT))
    await asyncio.wait_for(plane.entered.wait(), 10)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert budget.reserved_bytes == 0


async def test_one_request_has_a_bound_of_its_own(plane: GatedPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    servicer, budget = make_servicer(plane, monkeypatch)
    with pytest.raises(PayloadTooLarge, match="more than the maximum of 8000 bytes"):
        await servicer.Predict(zeros(ROWS + 1), CONTEXT)
    assert budget.reserved_bytes == 0
