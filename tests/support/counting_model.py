"""A decoupled model for tests: answers request N with 0, 1, ... N-1, as the request's parameters want it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from aiorch_server.backend import Backend, LoadContext, ModelInstance, ModelRequest, RequestInstance
from aiorch_server.errors import ModelExecutionError, RequestError
from aiorch_server.types import DataType, ModelSignature, TensorSpec

SIGNATURE = ModelSignature(
    (TensorSpec("N", DataType.INT32, (1,)),), (TensorSpec("I", DataType.INT32, (1,)),), max_batch_size=4
)
CONFIG = 'backend: "counting" model_transaction_policy { decoupled: true }'


class CountingBackend(Backend):
    """``gate`` holds back all answers but the first of requests with the parameter gate; ``held`` are open requests."""

    name = "counting"
    artefacts = ("counting.txt",)

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.has_cancel = threading.Event()
        self.held: list[ModelRequest] = []
        self.threads: list[threading.Thread] = []
        self.refusals: list[str] = []
        self.n_sent = 0
        self.act: Callable[[ModelRequest], None] | None = None

    def inspect(self, context: LoadContext) -> ModelSignature:
        return SIGNATURE

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        return CountingInstance(self)

    def close(self) -> None:
        self.gate.set()
        self.held.clear()
        for thread in self.threads:
            thread.join(20)


class CountingInstance(RequestInstance):
    def __init__(self, backend: CountingBackend) -> None:
        self._backend = backend

    def execute_requests(self, requests: Sequence[ModelRequest]) -> None:
        for request in requests:
            if request.parameters.get("raise"):
                raise ValueError("the model said no")
            if request.parameters.get("die"):
                raise SystemExit("the model left")
            if request.parameters.get("hold"):
                self._backend.held.append(request)
                request.send({"I": np.array([[-1]], np.int32)})
            elif self._backend.act is not None:
                self._backend.act(request)
            elif request.parameters.get("thread"):
                thread = threading.Thread(target=self._count, args=(request,))
                self._backend.threads.append(thread)
                thread.start()
            else:
                self._count(request)

    def _count(self, request: ModelRequest) -> None:
        try:
            self._count_all(request)
        except ModelExecutionError as error:
            self._backend.refusals.append(str(error))

    def _count_all(self, request: ModelRequest) -> None:
        wanted = int(request.inputs["N"][0, 0])
        ends_with_last = bool(request.parameters.get("final"))
        for index in range(wanted):
            if index and request.parameters.get("gate"):
                assert self._backend.gate.wait(20)
            if request.is_cancelled():
                self._backend.has_cancel.set()
            if request.parameters.get("error_at") == index:
                request.send_error(RequestError(f"no {index} today"))
                continue
            if request.parameters.get("fail_at") == index:
                request.fail(RequestError(f"it ends at {index}"))
                return
            if request.parameters.get("drop_at") == index:
                return
            request.send(
                {"I": np.array([[index]], np.int32)},
                {"place": index},
                is_final=ends_with_last and index == wanted - 1,
            )
            self._backend.n_sent += 1
        if not ends_with_last or not wanted:
            request.finish()
        if request.parameters.get("again"):
            request.send({"I": np.array([[wanted]], np.int32)})
