"""A request that nobody sent, for the warm-up of instances that take requests."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Final

from aiorch_server.backend import RequestInstance
from aiorch_server.errors import AiorchError, ModelExecutionError
from aiorch_server.types import ModelSignature, NumpyArray, Parameter

LONGEST_S: Final = 60.0


def rehearse(instance: RequestInstance, signature: ModelSignature, inputs: Mapping[str, NumpyArray]) -> None:
    """Runs one request and waits until the model has ended it; raises what it failed with, or ModelExecutionError."""
    request = RehearsedRequest(signature, inputs)
    instance.execute_requests([request])
    if not request.ended.wait(LONGEST_S):
        raise ModelExecutionError(f"a warm-up request was not answered within {LONGEST_S:g} s")
    if request.error is not None:
        raise request.error


class RehearsedRequest:
    """Takes answers and forgets them; see ``ModelRequest``."""

    id = ""
    parameters: Mapping[str, Parameter] = {}
    correlation_id: int | str = 0
    is_sequence_start = False
    is_sequence_end = False
    timeout_us = 0

    def __init__(self, signature: ModelSignature, inputs: Mapping[str, NumpyArray]) -> None:
        self.inputs = inputs
        self.requested_outputs = tuple(spec.name for spec in signature.outputs)
        self.ended = threading.Event()
        self.error: AiorchError | None = None
        self._is_decoupled = signature.is_decoupled

    @property
    def is_ended(self) -> bool:
        """Whether it was answered, ended or failed."""
        return self.ended.is_set()

    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return False

    def send(
        self,
        outputs: Mapping[str, NumpyArray],
        parameters: Mapping[str, Parameter] | None = None,
        *,
        is_final: bool = False,
    ) -> None:
        """See ``ModelRequest.send``."""
        if is_final or not self._is_decoupled:
            self.finish()

    def send_error(self, error: AiorchError) -> None:
        """See ``ModelRequest.send_error``."""
        self.error = error
        if not self._is_decoupled:
            self.finish()

    def finish(self) -> None:
        """See ``ModelRequest.finish``."""
        self.ended.set()

    def fail(self, error: AiorchError) -> None:
        """See ``ModelRequest.fail``."""
        self.error = error
        self.finish()
