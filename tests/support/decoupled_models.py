"""Decoupled models of Triton's python backend for tests, made to be steps of ensembles."""

from __future__ import annotations

from pathlib import Path

from ensembles import tensors

#: X [n, width] is answered with Y [0, ...], [1, ...] to n - 1, each ``width`` wide; parameters of the request say what
#: goes wrong and where. ``sent`` and ``cancelled`` tell a test in this process how far it came.
COUNT = """
import json
import numpy as np
import decoupled_models as told
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            self.count(request)

    def count(self, request):
        n, width = (int(value) for value in pb_utils.get_input_tensor_by_name(request, "X").as_numpy()[0])
        wants = json.loads(request.parameters() or "{}")
        sender = request.get_response_sender()
        for index in range(n):
            if request.is_cancelled():
                told.cancelled.add(request.request_id())
                break
            if wants.get("error_at") == index:
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(f"no {index} today")))
                continue
            if wants.get("fail_at") == index:
                raise ValueError(f"it ends at {index}")
            given = [pb_utils.Tensor("Y", np.full((1, max(width, 1)), index, np.float32))]
            if wants.get("bare_at") == index:
                given = []
            is_last = wants.get("final") and index == n - 1
            flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
            sender.send(pb_utils.InferenceResponse(given), flags)
            told.sent[request.request_id()] = index + 1
            if is_last:
                return
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

#: X [v] is answered v + 1 times: with Y [10 v], [10 v + 1], ...
SPREAD = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            value = float(pb_utils.get_input_tensor_by_name(request, "X").as_numpy()[0, 0])
            sender = request.get_response_sender()
            for index in range(int(value) + 1):
                given = np.array([[value * 10 + index]], np.float32)
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("Y", given)]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

#: By the id of a request: how many answers it has sent; and the ids of those that learned that nobody waits.
sent: dict[str, int] = {}
cancelled: set[str] = set()


def write_decoupled(root: Path, name: str, code: str, more: str = "") -> None:
    folder = root / name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(code)
    (root / name / "config.pbtxt").write_text(
        f'backend: "python" max_batch_size: 8 {tensors("input", ["X"])} {tensors("output", ["Y"])} '
        f"model_transaction_policy {{ decoupled: true }} {more}\n"
    )
