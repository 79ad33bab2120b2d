"""Sequences through unmodified Triton clients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from sequence_models import SIGNALS
from served import Served
from tritonclient.utils import InferenceServerException


def fill(module: Any, value: int) -> list[Any]:
    tensor = module.InferInput("value", [1, 1], "INT64")
    tensor.set_data_from_numpy(np.array([[value]], np.int64))
    return [tensor]


def signals_of(result: Any) -> dict[str, int]:
    return dict(zip(SIGNALS, result.as_numpy("signals")[0].tolist(), strict=True))


def test_a_sum_over_three_requests(served: Served) -> None:
    with triton_grpc.InferenceServerClient(served.grpc) as client:
        totals, seen = [], []
        for value, flags in ((1, {"sequence_start": True}), (2, {}), (3, {"sequence_end": True})):
            result = client.infer("oldest", fill(triton_grpc, value), sequence_id=42, **flags)
            totals.append(result.as_numpy("total").item())
            seen.append(signals_of(result))
            assert {output.name for output in result.get_response().outputs} == {"total", "signals"}
    assert totals == [1, 3, 6]
    assert [(each["start"], each["end"], each["ready"], each["corrid"]) for each in seen] == [
        (1, 0, 1, 42), (0, 0, 1, 42), (0, 1, 1, 42),
    ]  # fmt: skip


def test_without_start(served: Served) -> None:
    with triton_grpc.InferenceServerClient(served.grpc) as client, pytest.raises(InferenceServerException) as caught:
        client.infer("oldest", fill(triton_grpc, 1), sequence_id=7)
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert caught.value.message() == (
        "[request id: <id_unknown>] inference request for sequence 7 to model 'oldest' must specify the START flag on "
        "the first request of the sequence"
    )
