"""A model whose only purpose is a thread that computes in Python, in the server's process, from load to close."""

from __future__ import annotations

import threading
from typing import Any


class Model:
    inputs = (("INPUT0", "FP32", [1]),)
    outputs = (("OUTPUT0", "FP32", [1]),)
    max_batch_size = 1

    def load(self, context: Any) -> None:
        self._is_over = False
        threading.Thread(target=self._compute, name="busy", daemon=True).start()

    def _compute(self) -> None:
        number = 1
        while not self._is_over:
            for _ in range(1000):
                number = (number * 1103515245 + 12345) % 2147483648

    def execute(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"OUTPUT0": inputs["INPUT0"]}

    def close(self) -> None:
        self._is_over = True
