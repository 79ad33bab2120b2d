"""Instances that run requests of different shapes together: one by one out of the batch, as one into the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aiorch_server.backend import Backend, LoadContext, ModelInstance, ModelRequest, RequestInstance
from aiorch_server.errors import AiorchError, ModelExecutionError, ModelLoadError, RequestCancelled
from aiorch_server.execution.ragged_tensors import RaggedTensors
from aiorch_server.types import ModelSignature, NumpyArray


class RaggedBackend(Backend):
    """A backend whose instances take ragged requests; ``inner`` is the signature that the real one loads."""

    def __init__(self, backend: Backend, tensors: RaggedTensors, inner: ModelSignature) -> None:
        self.name = backend.name  # type: ignore[misc]
        self._backend = backend
        self._tensors = tensors
        self._inner = inner

    def inspect(self, context: LoadContext) -> ModelSignature:
        """The clients' signature."""
        return self._tensors.show(self._inner)

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        """An instance of the real backend behind one that joins requests; a model that takes requests gets them so.

        Raises ModelLoadError where such a model is to be given batch inputs, or have its outputs cut.
        """
        instance = self._backend.load(context, self._inner)
        if isinstance(instance, RequestInstance):
            if self._tensors.given or self._tensors.cuts:
                instance.close()
                raise ModelLoadError(
                    f"model '{context.model_name}': batch_input, batch_output: a model that takes its requests one by "
                    "one sees their shapes and gives each its own answer; remove them"
                )
            return instance
        if self._inner.max_batch_size:
            instance.close()
            raise ModelLoadError(
                f"model '{context.model_name}': allow_ragged_batch: backend '{self.name}' serves the model with a "
                "batch dimension; it must take ragged inputs as one dimension"
            )
        return _RaggedInstance(instance, self._tensors, [spec.name for spec in self._inner.outputs])


class _RaggedInstance(RequestInstance):
    """Not compiled: requests are joined, and ``outputs`` cut, with numpy."""

    def __init__(self, instance: ModelInstance, tensors: RaggedTensors, outputs: Sequence[str]) -> None:
        self._instance = instance
        self._tensors = tensors
        self._outputs = tuple(outputs)

    def execute_requests(self, requests: Sequence[ModelRequest]) -> None:
        """One run for those that somebody waits for; where it fails, none of them has ended."""
        wanted: list[ModelRequest] = []
        unwanted: list[ModelRequest] = []
        for request in requests:
            (unwanted if request.is_cancelled() else wanted).append(request)
        if wanted:
            members = [request.inputs for request in wanted]
            outputs = self._pick(self._instance.execute(self._tensors.gather(members)))
            for request, answer in zip(wanted, self._tensors.cut(outputs, members), strict=True):
                try:
                    request.send(answer)
                except AiorchError as error:
                    _fail(request, error)
        for request in unwanted:
            _fail(request, RequestCancelled("cancelled"))

    def _pick(self, given: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
        missing = [name for name in self._outputs if name not in given]
        if missing:
            raise ModelExecutionError(f"the model gave no output '{missing[0]}'; it gave {sorted(map(str, given))}")
        return {name: given[name] for name in self._outputs}

    def close(self) -> None:
        """Closes the real instance."""
        self._instance.close()


def _fail(request: ModelRequest, error: AiorchError) -> None:
    if not request.is_ended:
        request.fail(error)
