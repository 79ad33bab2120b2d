"""PredictionService and ModelService over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aiorch_proto.tfserving import serving_pb2 as pb

from aiorch_server.errors import CapacityError, RequestError, UnsupportedRequest
from aiorch_server.frontends.grpc.unary import read_deadline_ns
from aiorch_server.frontends.tfserving import examples, information, tensors
from aiorch_server.frontends.tfserving.models import (
    SIGNATURE,
    Infer,
    ModelCatalogue,
    Served,
    UnknownSignature,
    Wanted,
    check_names,
    find_example_model,
    find_model,
    is_known_signature,
)
from aiorch_server.frontends.unpacking import UnpackBudget
from aiorch_server.types import InferenceRequest, InferenceResponse

if TYPE_CHECKING:
    from aiorch_server.dataplane import DataPlane

CLASSIFY: Final = "tensorflow/serving/classify"
REGRESS: Final = "tensorflow/serving/regress"
#: From this size on messages are taken apart and put together on another thread: lists of numbers take their time.
_LARGE_BYTES: Final = 1 << 16
_Result = TypeVar("_Result")


class ServingServicer:
    """The RPCs over the two planes, one method each; what they raise becomes a status where they are registered.

    ``max_tensor_bytes`` bounds what the inputs of one request hold: a few bytes of a message can stand for a lot.
    """

    def __init__(self, dataplane: DataPlane, catalogue: ModelCatalogue, *, max_tensor_bytes: int) -> None:
        self._dataplane = dataplane
        self._catalogue = catalogue
        self._max_tensor_bytes = max_tensor_bytes
        self._budget = UnpackBudget()

    async def Predict(self, request: pb.PredictRequest, context: Any) -> pb.PredictResponse:
        """Tensors in, tensors out."""
        wanted = Wanted.read(request)
        model = await find_model(self._catalogue, wanted, deadline_ns=read_deadline_ns(context))
        if not is_known_signature(wanted):
            raise UnknownSignature(f'Serving signature key "{wanted.signature}" not found.')
        check_names(model.signature, request.inputs, request.output_filter)
        sent = request.ByteSize()
        size = await _run_sized(sent, tensors.measure_tensors, request.inputs, self._max_tensor_bytes)
        async with self._reserving(size - sent):
            inputs = await _run_sized(size, tensors.decode_tensors, request.inputs)
            answer = await model.run(self._bind(context), inputs, request.output_filter)

        def encode() -> pb.PredictResponse:
            response = pb.PredictResponse(model_spec=information.describe_model(model))
            response.model_spec.version.value = int(answer.model_version)
            for output in answer.outputs:
                tensors.encode_tensor(output, response.outputs[output.name])
            return response

        return await _run_sized(sum(len(output.data or b"") for output in answer.outputs), encode)

    async def Classify(self, request: pb.ClassificationRequest, context: Any) -> pb.ClassificationResponse:
        """Classes and scores for examples."""
        model = await find_example_model(self._catalogue, Wanted.read(request), deadline_ns=read_deadline_ns(context))
        result = await examples.classify(model, request.input, self._bind(context))
        return pb.ClassificationResponse(result=result, model_spec=information.describe_model(model))

    async def Regress(self, request: pb.RegressionRequest, context: Any) -> pb.RegressionResponse:
        """A value for each example."""
        model = await find_example_model(self._catalogue, Wanted.read(request), deadline_ns=read_deadline_ns(context))
        result = await examples.regress(model, request.input, self._bind(context))
        return pb.RegressionResponse(result=result, model_spec=information.describe_model(model))

    async def MultiInference(self, request: pb.MultiInferenceRequest, context: Any) -> pb.MultiInferenceResponse:
        """Classify or Regress, as each task says; each signature may be asked for once, and a model has one."""
        response = pb.MultiInferenceResponse()
        for task, model in await self._plan(request.tasks, read_deadline_ns(context)):
            part = response.results.add(model_spec=information.describe_model(model))
            if task.method_name == CLASSIFY:
                result = await examples.classify(model, request.input, self._bind(context))
                part.classification_result.CopyFrom(result)
            else:
                part.regression_result.CopyFrom(await examples.regress(model, request.input, self._bind(context)))
        return response

    async def GetModelMetadata(self, request: pb.GetModelMetadataRequest, context: Any) -> pb.GetModelMetadataResponse:
        """Inputs and outputs of a model."""
        wanted = Wanted.read(request)
        information.check_fields(request.metadata_field)
        return information.encode_metadata(
            await find_model(self._catalogue, wanted, is_run=False, deadline_ns=read_deadline_ns(context))
        )

    async def GetModelStatus(self, request: pb.GetModelStatusRequest, context: Any) -> pb.GetModelStatusResponse:
        """States of the versions of a model."""
        return information.find_status(self._catalogue, Wanted.read(request))

    async def HandleReloadConfigRequest(self, request: pb.ReloadConfigRequest, context: Any) -> pb.ReloadConfigResponse:
        """Refused."""
        raise UnsupportedRequest(
            "the configuration cannot be replaced over this protocol: models come from the repository; load and unload "
            "them with RepositoryModelLoad and RepositoryModelUnload of inference.GRPCInferenceService, and write "
            "version labels into the model's configuration"
        )

    async def _plan(self, tasks: Sequence[Any], deadline_ns: int) -> list[tuple[Any, Served]]:
        """The tasks with their models; RequestError for what TensorFlow Serving does not take either."""
        if any(not task.model_spec.name for task in tasks):
            raise RequestError("Found ModelSpec with an empty model name.")
        if len({task.model_spec.name for task in tasks}) > 1:
            raise RequestError("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
        if len(tasks) > 1:
            raise RequestError(f"Duplicate evaluation of signature: {SIGNATURE}")
        planned = []
        for task in tasks:
            wanted = Wanted.read_spec(task.model_spec)
            model = await find_model(self._catalogue, wanted, deadline_ns=deadline_ns)
            if not is_known_signature(wanted):
                raise RequestError(f"Requested signature not found in model graph: {wanted.signature}")
            if task.method_name not in (CLASSIFY, REGRESS):
                raise UnsupportedRequest(f"Unsupported signature method_name: {task.method_name}")
            planned.append((task, model))
        return planned

    def _bind(self, context: Any) -> Infer:
        deadline_ns = read_deadline_ns(context)

        async def infer(request: InferenceRequest) -> InferenceResponse:
            return await self._dataplane.infer(request, deadline_ns=deadline_ns)

        return infer

    @contextlib.asynccontextmanager
    async def _reserving(self, size: int) -> AsyncIterator[None]:
        """Holds ``size`` bytes of the budget for what is larger than it was sent."""
        size = max(0, size)
        if not size:
            yield
            return
        try:
            await self._budget.reserve(size)
        except TimeoutError:
            raise CapacityError("other requests take all the memory there is for expanding tensors") from None
        try:
            yield
        finally:
            self._budget.release(size)


async def _run_sized(size: int, work: Callable[..., _Result], *arguments: Any) -> _Result:
    """The result of ``work`` on ``size`` bytes; on another thread if they are many."""
    return work(*arguments) if size < _LARGE_BYTES else await asyncio.to_thread(work, *arguments)
