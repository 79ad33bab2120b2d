"""One ``TritonPythonModel``: batches come as requests, answers go back by return, by sender, or from its coroutines."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Final

from aiorch_backends.python.modules import UserModule, summarize
from aiorch_backends.python.triton import messages
from aiorch_backends.python.triton.failures import TritonModelException
from aiorch_backends.python.triton.messages import InferenceResponse
from aiorch_backends.python.triton.model_config import fill_config
from aiorch_server.backend import LoadContext, ModelRequest, RequestInstance
from aiorch_server.errors import AiorchError, ModelExecutionError
from aiorch_server.types import ModelSignature

logger = logging.getLogger(__name__)

_STOP_S: Final = 10.0


class TritonInstance(RequestInstance):
    """Owns the imported module; one thread executes, a second one runs an ``async def execute``."""

    def __init__(self, module: UserModule, context: LoadContext, signature: ModelSignature) -> None:
        """Makes the model and calls its ``initialize``; raises what these raise."""
        self._module: UserModule | None = module
        self._owner = (context.model_name, context.model_version)
        self._name = f"{context.model_name}_0_{context.instance_index}"
        self._specs = {spec.name: spec for spec in signature.inputs}
        self._signature = signature
        self._is_decoupled = signature.is_decoupled
        self._request_class: type[messages.InferenceRequest] = module.utilities.InferenceRequest
        self._coroutines: _CoroutineThread | None = None
        self._model = module.model_class()
        if hasattr(self._model, "initialize"):
            self._model.initialize(_describe(context, self._name))

    def execute_requests(self, requests: Sequence[ModelRequest]) -> None:
        """ModelExecutionError with type and text of what the model raised."""
        if self._module is None:
            raise ModelExecutionError("the instance is closed")
        made = [self._request_class._of(each, self._specs, self._owner, self._signature) for each in requests]
        try:
            result = self._model.execute(made)
            if asyncio.iscoroutine(result):
                coroutines = self._ensure_coroutines()
                if self._is_decoupled:
                    coroutines.start_one(self._watch(result, list(requests)))
                    return
                result = coroutines.run(result)
            self._answer(made, requests, result)
        except AiorchError:
            raise
        except (Exception, SystemExit) as error:
            raise self._explain(error) from error

    def close(self) -> None:
        """Ends the coroutines, calls the model's ``finalize`` and forgets the module; what it raises is logged."""
        module, self._module = self._module, None
        if module is None:
            return
        try:
            if self._coroutines is not None:
                self._coroutines.stop()
            if hasattr(self._model, "finalize"):
                self._model.finalize()
        except (Exception, SystemExit):
            logger.exception("model '%s': its finalize() failed", self._owner[0])
        finally:
            self._model = None
            module.close()

    def _answer(self, made: Sequence[messages.InferenceRequest], requests: Sequence[ModelRequest], result: Any) -> None:
        if result is None:
            return
        if self._is_decoupled:
            raise TritonModelException(
                f"Python model '{self._name}' is using the decoupled mode and the execute function must return None."
            )
        if not isinstance(result, list):
            raise TritonModelException(f"Expected a list in the execute return, found type '{type(result)}'.")
        if len(result) != len(made):
            raise TritonModelException(
                "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
                f"InferenceRequest(s) size is:{len(made)}, and InferenceResponse(s) size is:{len(result)}"
            )
        for response in result:
            if response is not None and not isinstance(response, InferenceResponse):
                raise TritonModelException(
                    "Expected an 'InferenceResponse' object in the execute function return list, found type "
                    f"'{type(response)}'."
                )
        for mine, request, response in zip(made, requests, result, strict=True):
            if response is None:
                continue
            try:
                mine.get_response_sender().send(response, 1)
            except TritonModelException as error:
                # Of this answer alone; what it was answered before stays.
                if not request.is_ended:
                    request.fail(self._explain(error))

    async def _watch(self, execution: Coroutine[Any, Any, Any], requests: list[ModelRequest]) -> None:
        """Awaits an execution of a decoupled model; what it leaves open when it fails ends with its error."""
        try:
            result = await execution
            if result is not None:
                self._answer([], [], result)
        except BaseException as error:
            logger.error("model '%s': execute failed", self._owner[0], exc_info=error)
            for request in requests:
                if not request.is_ended:
                    request.fail(self._explain(error))
            if not isinstance(error, Exception):
                raise

    def _explain(self, error: BaseException) -> ModelExecutionError:
        return ModelExecutionError(
            f"Failed to process the request(s) for model '{self._name}', message: {summarize(error)}"
        )

    def _ensure_coroutines(self) -> _CoroutineThread:
        if self._coroutines is None:
            self._coroutines = _CoroutineThread(self._name)
        return self._coroutines


class _CoroutineThread:
    """An event loop of the model's own, on a thread of its own."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name=f"{name} coroutines", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Its result; blocks."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def start_one(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Runs it beside the others."""
        self._loop.call_soon_threadsafe(self._start, coroutine)

    def stop(self) -> None:
        """Cancels what still runs and ends the thread."""
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result(_STOP_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_S)
        if not self._thread.is_alive():
            self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel_all(self) -> None:
        others = asyncio.all_tasks(self._loop) - {asyncio.current_task(self._loop)}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_default_executor()


def _describe(context: LoadContext, name: str) -> dict[str, str]:
    """The argument of ``initialize``: strings only, as Triton gives them."""
    kind, _, number = context.device.partition(":")
    return {
        "model_config": json.dumps(fill_config(context.config)),
        "model_instance_kind": "GPU" if kind == "cuda" else "CPU",
        "model_instance_name": name,
        "model_instance_device_id": number or "0",
        "model_repository": str(context.model_directory),
        "model_version": str(context.model_version),
        "model_name": context.model_name,
    }
