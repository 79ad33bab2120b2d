"""Clients that others wrote behind one small interface, so that each scenario is told once."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import grpc
import grpclib
import grpclib.client
import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
from running_site import INFER, SERVICE, TIMEOUT_S, Site
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

Array = np.ndarray[Any, np.dtype[np.float32]]
Metadata = Sequence[tuple[str, str | bytes]]


class Refused(Exception):
    """The server's status, by name, and its text."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


def build_request(rows: Array, model: str) -> Any:
    request = pb.ModelInferRequest(model_name=model)
    request.inputs.add(name="INPUT0", datatype="FP32", shape=rows.shape)
    request.raw_input_contents.append(rows.tobytes())
    return request


def read_response(response: Any) -> Array:
    (output,) = response.outputs
    assert (output.name, output.datatype) == ("OUTPUT0", "FP32")
    return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(output.shape)


class ForeignClient:
    """What each of them can do; those that cannot do a thing do not have it in ``can``."""

    can: ClassVar[frozenset[str]] = frozenset({"deadline", "cancel", "metadata", "stream", "gzip"})

    def __init__(self, site: Site, root: Path | None) -> None:
        raise NotImplementedError

    async def infer(
        self, rows: Array, model: str = "identity", *, timeout_s: float = TIMEOUT_S, metadata: Metadata = (),
        is_gzip: bool = False,
    ) -> Array:  # fmt: skip
        """One answer; raises Refused."""
        raise NotImplementedError

    async def infer_and_cancel(self, rows: Array, model: str, has_arrived: Awaitable[None]) -> None:
        """Gives the call up once it has arrived."""
        call = asyncio.ensure_future(self.infer(rows, model))
        await has_arrived
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call
            raise AssertionError("a cancelled call was answered")

    async def converse(self, requests: Iterable[tuple[Array, str]], metadata: Metadata = ()) -> list[Array | str]:
        """A stream: for each request its answer, or the error's text."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


def _channel_options() -> list[tuple[str, int]]:
    sizes = {"max_receive_message_length": -1, "max_send_message_length": -1, "use_local_subchannel_pool": 1}
    return [(f"grpc.{name}", value) for name, value in sizes.items()]


def _answer_or_text(response: Any) -> Array | str:
    return str(response.error_message) if response.error_message else read_response(response.infer_response)


class GrpcioClient(ForeignClient):
    """grpcio's blocking stubs, each call on a thread."""

    def __init__(self, site: Site, root: Path | None, **options: int) -> None:
        arguments = [*_channel_options(), *((f"grpc.{name}", value) for name, value in options.items())]
        if root is None:
            self.channel = grpc.insecure_channel(site.target, arguments)
        else:
            self.channel = grpc.secure_channel(site.target, grpc.ssl_channel_credentials(root.read_bytes()), arguments)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def call(self, rows: Array, model: str = "identity", **options: Any) -> Array:
        try:
            return read_response(self.stub.ModelInfer(build_request(rows, model), **options))
        except grpc.RpcError as error:
            raise Refused(error.code().name, error.details()) from error

    async def infer(self, rows: Array, model: str = "identity", **options: Any) -> Array:
        return await asyncio.to_thread(self.call, rows, model, **_grpcio_options(**options))

    async def infer_and_cancel(self, rows: Array, model: str, has_arrived: Awaitable[None]) -> None:
        future = self.stub.ModelInfer.future(build_request(rows, model))
        await has_arrived
        assert future.cancel()
        assert future.code() is grpc.StatusCode.CANCELLED

    async def converse(self, requests: Iterable[tuple[Array, str]], metadata: Metadata = ()) -> list[Array | str]:
        def run() -> list[Array | str]:
            sent = iter([build_request(rows, model) for rows, model in requests])
            try:
                answers = self.stub.ModelStreamInfer(sent, metadata=metadata, timeout=TIMEOUT_S)
                return [_answer_or_text(response) for response in answers]
            except grpc.RpcError as error:
                raise Refused(error.code().name, error.details()) from error

        return await asyncio.to_thread(run)

    async def close(self) -> None:
        self.channel.close()


def _grpcio_options(timeout_s: float = TIMEOUT_S, metadata: Metadata = (), is_gzip: bool = False) -> dict[str, Any]:
    compression = grpc.Compression.Gzip if is_gzip else None
    return {"timeout": timeout_s, "metadata": tuple(metadata), "compression": compression}


class GrpcioAioClient(ForeignClient):
    """grpcio's asyncio stubs."""

    def __init__(self, site: Site, root: Path | None, **options: int) -> None:
        arguments = [*_channel_options(), *((f"grpc.{name}", value) for name, value in options.items())]
        if root is None:
            self.channel = grpc.aio.insecure_channel(site.target, arguments)
        else:
            trust = grpc.ssl_channel_credentials(root.read_bytes())
            self.channel = grpc.aio.secure_channel(site.target, trust, arguments)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    async def infer(
        self, rows: Array, model: str = "identity", *, wait_for_ready: bool | None = None, **options: Any
    ) -> Array:
        arguments = {**_grpcio_options(**options), "wait_for_ready": wait_for_ready}
        try:
            return read_response(await self.stub.ModelInfer(build_request(rows, model), **arguments))
        except grpc.aio.AioRpcError as error:
            raise Refused(error.code().name, error.details()) from error

    async def converse(self, requests: Iterable[tuple[Array, str]], metadata: Metadata = ()) -> list[Array | str]:
        """In turns: each answer is awaited before the next request is sent."""
        call = self.stub.ModelStreamInfer(metadata=tuple(metadata), timeout=TIMEOUT_S)
        answers: list[Array | str] = []
        try:
            for rows, model in requests:
                await call.write(build_request(rows, model))
                answers.append(_answer_or_text(await call.read()))
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
        except grpc.aio.AioRpcError as error:
            raise Refused(error.code().name, error.details()) from error
        except AttributeError:  # the end instead of an answer
            raise Refused((await call.code()).name, await call.details()) from None
        assert await call.code() is grpc.StatusCode.OK
        return answers

    async def close(self) -> None:
        await self.channel.close()


def _refuse_triton(error: InferenceServerException) -> Refused:
    return Refused(str(error.status()).removeprefix("StatusCode."), str(error.message()))


class TritonGrpcClient(ForeignClient):
    """tritonclient.grpc."""

    module: Any = triton_grpc

    def __init__(self, site: Site, root: Path | None) -> None:
        tls = {} if root is None else {"ssl": True, "root_certificates": str(root)}
        self.client = self.module.InferenceServerClient(site.target, **tls)

    def _inputs(self, rows: Array) -> list[Any]:
        tensor = self.module.InferInput("INPUT0", rows.shape, "FP32")
        tensor.set_data_from_numpy(rows)
        return [tensor]

    @staticmethod
    def _options(timeout_s: float = TIMEOUT_S, metadata: Metadata = (), is_gzip: bool = False) -> dict[str, Any]:
        compression = "gzip" if is_gzip else None
        return {"client_timeout": timeout_s, "headers": dict(metadata), "compression_algorithm": compression}

    async def infer(self, rows: Array, model: str = "identity", **options: Any) -> Array:
        try:
            result = await asyncio.to_thread(self.client.infer, model, self._inputs(rows), **self._options(**options))
        except InferenceServerException as error:
            raise _refuse_triton(error) from error
        return np.asarray(result.as_numpy("OUTPUT0"))

    async def infer_and_cancel(self, rows: Array, model: str, has_arrived: Awaitable[None]) -> None:
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Any] = loop.create_future()
        call = self.client.async_infer(
            model, self._inputs(rows), lambda result, error: loop.call_soon_threadsafe(told.set_result, (result, error))
        )
        await has_arrived
        call.cancel()
        result, error = await asyncio.wait_for(told, TIMEOUT_S)
        assert result is None and "CANCELLED" in str(error.status())

    async def converse(self, requests: Iterable[tuple[Array, str]], metadata: Metadata = ()) -> list[Array | str]:
        wanted = list(requests)
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[tuple[Any, Any]] = asyncio.Queue()
        self.client.start_stream(
            lambda result, error: loop.call_soon_threadsafe(told.put_nowait, (result, error)),
            headers=dict(metadata),
        )
        answers: list[Array | str] = []
        try:
            for rows, model in wanted:
                self.client.async_stream_infer(model, self._inputs(rows))
            for _ in wanted:
                result, error = await asyncio.wait_for(told.get(), TIMEOUT_S)
                if error is not None and error.status() is not None:
                    raise _refuse_triton(error)
                answers.append(str(error.message()) if error is not None else result.as_numpy("OUTPUT0"))
        finally:
            await asyncio.to_thread(self.client.stop_stream)
        return answers

    async def close(self) -> None:
        self.client.close()


class TritonGrpcAioClient(TritonGrpcClient):
    """tritonclient.grpc.aio."""

    module = triton_grpc_aio

    async def infer(self, rows: Array, model: str = "identity", **options: Any) -> Array:
        try:
            result = await self.client.infer(model, self._inputs(rows), **self._options(**options))
        except InferenceServerException as error:
            raise _refuse_triton(error) from error
        return np.asarray(result.as_numpy("OUTPUT0"))

    infer_and_cancel = ForeignClient.infer_and_cancel

    async def converse(self, requests: Iterable[tuple[Array, str]], metadata: Metadata = ()) -> list[Array | str]:
        async def send() -> AsyncIterator[dict[str, Any]]:
            for rows, model in requests:
                yield {"model_name": model, "inputs": self._inputs(rows)}

        answers: list[Array | str] = []
        try:
            async for result, error in self.client.stream_infer(send(), headers=dict(metadata)):
                answers.append(str(error.message()) if error is not None else result.as_numpy("OUTPUT0"))
        except grpc.aio.AioRpcError as error:  # here it lets grpcio's own through
            raise Refused(error.code().name, error.details()) from error
        return answers

    async def close(self) -> None:
        await self.client.close()


class TritonHttpClient(ForeignClient):
    """tritonclient.http, at the REST door of the same server; its greenlets belong to one thread."""

    can = frozenset({"gzip"})

    def __init__(self, site: Site, root: Path | None) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.client = triton_http.InferenceServerClient(site.http)

    async def infer(
        self, rows: Array, model: str = "identity", *, timeout_s: float = TIMEOUT_S, metadata: Metadata = (),
        is_gzip: bool = False,
    ) -> Array:  # fmt: skip
        def run() -> Array:
            tensor = triton_http.InferInput("INPUT0", list(rows.shape), "FP32")
            tensor.set_data_from_numpy(rows)
            packed = "gzip" if is_gzip else None
            result = self.client.infer(
                model, [tensor], request_compression_algorithm=packed, response_compression_algorithm=packed
            )
            return np.asarray(result.as_numpy("OUTPUT0"))

        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, run)
        except InferenceServerException as error:
            code = {"400": "INVALID_ARGUMENT", "404": "NOT_FOUND"}[error.status()]
            raise Refused(code, str(error.message())) from error

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self.thread, self.client.close)
        self.thread.shutdown()


class GrpclibClient(ForeignClient):
    """grpclib: pure Python, its own HTTP/2."""

    can = ForeignClient.can - {"gzip"}

    def __init__(self, site: Site, root: Path | None) -> None:
        context = None
        if root is not None:
            context = ssl.create_default_context(cafile=str(root))
            context.set_alpn_protocols(["h2"])
        self.channel = grpclib.client.Channel("127.0.0.1", site.port, ssl=context)
        types = pb.ModelInferRequest, pb.ModelInferResponse
        self.unary: Any = grpclib.client.UnaryUnaryMethod(self.channel, INFER, *types)
        stream_types = pb.ModelInferRequest, pb.ModelStreamInferResponse
        self.stream: Any = grpclib.client.StreamStreamMethod(
            self.channel, f"/{SERVICE}/ModelStreamInfer", *stream_types
        )

    async def infer(
        self, rows: Array, model: str = "identity", *, timeout_s: float = TIMEOUT_S, metadata: Metadata = (),
        is_gzip: bool = False,
    ) -> Array:  # fmt: skip
        try:
            return read_response(
                await self.unary(build_request(rows, model), timeout=timeout_s, metadata=list(metadata))
            )
        except grpclib.GRPCError as error:
            raise Refused(error.status.name, error.message or "") from error
        except TimeoutError as error:  # it watches its own deadline and may be first to see it
            raise Refused("DEADLINE_EXCEEDED", str(error)) from error

    async def converse(self, requests: Iterable[tuple[Array, str]], metadata: Metadata = ()) -> list[Array | str]:
        answers: list[Array | str] = []
        try:
            async with self.stream.open(timeout=TIMEOUT_S, metadata=list(metadata)) as stream:
                for rows, model in requests:
                    await stream.send_message(build_request(rows, model))
                    response = await stream.recv_message()
                    if response is None:
                        break
                    answers.append(_answer_or_text(response))
                await stream.end()
                assert await stream.recv_message() is None
        except grpclib.GRPCError as error:
            raise Refused(error.status.name, error.message or "") from error
        return answers

    async def close(self) -> None:
        """Waits for the end of the connection, which grpclib itself leaves to the loop."""
        protocol, has_ended = self.channel._protocol, asyncio.Event()
        assert protocol is not None
        connection_lost = protocol.connection_lost

        def note_end(error: BaseException | None) -> None:
            connection_lost(error)
            has_ended.set()

        protocol.connection_lost = note_end  # type: ignore[method-assign]
        self.channel.close()
        await asyncio.wait_for(has_ended.wait(), TIMEOUT_S)


CLIENTS: dict[str, Callable[..., ForeignClient]] = {
    "grpcio": GrpcioClient,
    "grpcio-aio": GrpcioAioClient,
    "tritonclient": TritonGrpcClient,
    "tritonclient-aio": TritonGrpcAioClient,
    "tritonclient-http": TritonHttpClient,
    "grpclib": GrpclibClient,
}
