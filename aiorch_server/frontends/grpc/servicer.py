"""The V2 service: every RPC that the compiled path does not answer, and the plain ModelInfer that it declined.

Registered at the standard path and, for stubs made from our own .proto files, at the path of our package. Messages
arrive here as bytes, so that malformed ones get the same words at every door and a malformed one in a stream fails
alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

from aiorch_proto.v2 import inference_pb2 as pb
from aiorch_proto.v2.service import METHODS, PACKAGE_SERVICE_NAME, SERVICE_NAME, Method

from aiorch_server.errors import DeadlineExpired, UnsupportedRequest
from aiorch_server.frontends.grpc import convert
from aiorch_server.frontends.grpc.methods import RpcMethod, add_methods
from aiorch_server.frontends.grpc.regions import SharedMemoryRpcs
from aiorch_server.frontends.grpc.settings import SettingRpcs
from aiorch_server.frontends.grpc.status import abort_call, describe_error
from aiorch_server.frontends.grpc.stream import SequenceOrder, Turn, run_stream
from aiorch_server.frontends.grpc.unary import (
    build_unary_method,
    own_cancellation_only,
    read_deadline_ns,
    watch_call,
)
from aiorch_server.tracing import Incoming, receive
from aiorch_server.types import FINAL_RESPONSE, InferenceRequest, InferenceResponse

if TYPE_CHECKING:
    from aiorch_server.controlplane import ControlPlane
    from aiorch_server.dataplane import DataPlane

#: From this number of elements on typed contents are unpacked on another thread: a million takes up to 0.8 s.
_MANY_ELEMENTS: Final = 1 << 13
#: As Triton says it. HTTP/2 tells clients that no new call may begin here; of a stream that is open it says nothing.
_SHUTTING_DOWN: Final = "GRPC server is shutting down and has stopped accepting new requests."
#: What a timer may be early, and the deadline of a request before that of its call.
_TIMER_NS: Final = 2_000_000


class _StreamFailed(Exception):
    """The error with which a stream ends: its time is up, or its client wants it closed at the first one."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _CallOver(Exception):
    """Nobody is there to be written to; the cancellation that follows has not come to this task yet."""


class InferenceServicer(SharedMemoryRpcs, SettingRpcs):
    """The RPCs over the two planes, one method each; what they raise becomes a status in ``add_inference_service``."""

    def __init__(self, dataplane: DataPlane, controlplane: ControlPlane) -> None:
        self._dataplane = dataplane
        self._controlplane = controlplane

    # ------------------------------------------------------------------------------------------ health, metadata

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        """Whether the process answers."""
        return pb.ServerLiveResponse(live=self._controlplane.is_live())

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        """Whether the server takes inference requests."""
        return pb.ServerReadyResponse(ready=self._controlplane.is_ready())

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        """Whether a model version takes inference requests."""
        return pb.ModelReadyResponse(ready=self._controlplane.model_ready(request.name, request.version))

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        """Name, version and extensions of the server."""
        return convert.encode_server_metadata(self._controlplane.server_metadata())

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        """Tensors and versions of a model."""
        await self._controlplane.bring(request.name, request.version, deadline_ns=read_deadline_ns(context))
        return convert.encode_model_metadata(self._controlplane.model_metadata(request.name, request.version))

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Any) -> pb.ModelConfigResponse:
        """The completed configuration of a model version."""
        await self._controlplane.bring(request.name, request.version, deadline_ns=read_deadline_ns(context))
        config = self._controlplane.model_config(request.name, request.version)
        return convert.encode_model_config(config.to_dict())

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Any) -> pb.ModelStatisticsResponse:
        """Counts of one or all model versions."""
        return convert.encode_statistics(self._controlplane.statistics(request.name, request.version))

    # ------------------------------------------------------------------------------------------------- inference

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        """One request, one response."""
        with watch_call(context, f"{SERVICE_NAME}/ModelInfer"):
            return convert.encode_infer_response(await self._infer(request, context))

    async def ModelStreamInfer(self, messages: AsyncIterator[bytes], context: Any) -> None:
        """Answers to each request, in order for ordinary models; errors travel inside them and leave the stream open.

        With the request metadata ``triton_grpc_error: true`` the first error closes the stream with its status; so does
        the end of the call's own time.
        """
        deadline_ns = read_deadline_ns(context)
        closes_on_error = ("triton_grpc_error", "true") in (context.invocation_metadata() or ())
        writing = asyncio.Lock()
        sequences = SequenceOrder()

        async def write(response: pb.ModelStreamInferResponse, error: Exception | None) -> None:
            if error is not None:
                if closes_on_error:
                    raise _StreamFailed(error)
                response.error_message = describe_error(error)[1]
            async with writing:
                if context.done():
                    raise _CallOver
                await context.write(response.SerializeToString())

        async def respond(message: bytes, turn: Turn) -> None:
            own = incoming.separate()
            failed = pb.ModelStreamInferResponse()
            failed.infer_response.parameters[FINAL_RESPONSE].bool_param = True
            own_turn: Turn | None = None
            try:
                request = convert.parse_message(pb.ModelInferRequest, message)
                failed.infer_response.id = request.id
                self._controlplane.check_running(_SHUTTING_DOWN)
                if "sequence_id" in request.parameters:
                    own_turn = sequences.join(request.parameters["sequence_id"].SerializeToString())
                name, version = request.model_name, request.model_version
                await self._controlplane.bring(name, version, deadline_ns=deadline_ns)
                is_decoupled = self._dataplane.is_decoupled(name, version)
                if is_decoupled:
                    turn.leave()
                if own_turn is not None:
                    await own_turn.wait()
                async with contextlib.aclosing(self._stream(request, deadline_ns, is_decoupled)) as answers:
                    while (answer := await own_cancellation_only(anext(answers, None))) is not None:
                        if own_turn is not None:
                            own_turn.leave()
                        await turn.wait()
                        await write(_encode_answer(answer, own), answer.error)
            except (_StreamFailed, _CallOver):
                raise
            except Exception as error:
                if isinstance(error, DeadlineExpired) and 0 < deadline_ns < time.monotonic_ns() + _TIMER_NS:
                    raise _StreamFailed(error) from None  # the call's time, not only the request's
                if own_turn is not None:
                    own_turn.leave()
                await turn.wait()
                _add_timing(failed.infer_response, own)
                await write(failed, error)
            finally:
                if own_turn is not None:
                    own_turn.leave()

        method = f"{SERVICE_NAME}/ModelStreamInfer"
        try:
            with receive(context.invocation_metadata() or (), "grpc", method) as incoming:
                await run_stream(messages, respond)
        except _CallOver:
            return
        except _StreamFailed as failed:
            await abort_call(failed.error, context)

    async def _stream(
        self, request: pb.ModelInferRequest, deadline_ns: int, is_decoupled: bool
    ) -> AsyncGenerator[InferenceResponse, None]:
        """The answers to one request of a stream, less an empty last one that the client did not ask for."""
        neutral = await self._decode(request)
        wants_empty = neutral.parameters.get("triton_enable_empty_final_response") is True
        async with contextlib.aclosing(self._dataplane.stream(neutral, deadline_ns=deadline_ns)) as answers:
            async for answer in answers:
                is_empty_end = is_decoupled and not answer.outputs and answer.error is None
                if not is_empty_end or wants_empty or not answer.parameters.get(FINAL_RESPONSE):
                    yield answer

    async def _infer(self, request: pb.ModelInferRequest, context: Any) -> InferenceResponse:
        deadline_ns = read_deadline_ns(context)
        return await self._dataplane.infer(await self._decode(request), deadline_ns=deadline_ns)

    async def _decode(self, request: pb.ModelInferRequest) -> InferenceRequest:
        if convert.count_contents(request) < _MANY_ELEMENTS:
            return convert.decode_infer_request(request)
        return await asyncio.to_thread(convert.decode_infer_request, request)

    # ------------------------------------------------------------------------------------------------ repository

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Any) -> pb.RepositoryIndexResponse:
        """What the repositories hold."""
        _refuse_repository_name(request)
        return convert.encode_index(self._controlplane.repository_index(request.ready))

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Any
    ) -> pb.RepositoryModelLoadResponse:
        """Loads a model and returns when it is ready."""
        _refuse_repository_name(request)
        config_json, files = convert.decode_load_parameters(request.parameters, request.model_name)
        await self._controlplane.load_model(request.model_name, config_json, files)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Any
    ) -> pb.RepositoryModelUnloadResponse:
        """Takes a model out of service."""
        _refuse_repository_name(request)
        unload_dependents = convert.decode_unload_parameters(request.parameters)
        await self._controlplane.unload_model(request.model_name, unload_dependents)
        return pb.RepositoryModelUnloadResponse()


def add_inference_service(servicer: InferenceServicer, server: Any) -> None:
    """Registers all methods of ``servicer`` with ``server``, a ``grpc.aio.Server`` or one with its surface."""
    methods = {name: _build_method(getattr(servicer, name), method) for name, method in METHODS.items()}
    for service in (SERVICE_NAME, PACKAGE_SERVICE_NAME):
        add_methods(server, service, methods)


def _build_method(rpc: Callable[..., Awaitable[Any]], method: Method) -> RpcMethod:
    if method.is_streaming:
        return RpcMethod(request_streaming=True, response_streaming=True, stream_stream=rpc)
    return build_unary_method(rpc, method.request)


def _encode_answer(answer: InferenceResponse, incoming: Incoming) -> pb.ModelStreamInferResponse:
    message = convert.encode_infer_response(answer)
    if FINAL_RESPONSE not in answer.parameters:
        message.parameters[FINAL_RESPONSE].bool_param = False
    elif answer.parameters[FINAL_RESPONSE]:
        _add_timing(message, incoming)
    return pb.ModelStreamInferResponse(infer_response=message)


def _add_timing(message: pb.ModelInferResponse, incoming: Incoming) -> None:
    """What a single request has as trailing metadata: those of a stream come once, and it has many requests."""
    for name, value in incoming.trailing_metadata():
        message.parameters[name].string_param = value


def _refuse_repository_name(request: Any) -> None:
    if request.repository_name:
        raise UnsupportedRequest(
            f"'repository_name' specification is not supported, expected it to be empty, got "
            f"'{request.repository_name}'"
        )
