"""The asyncio client."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import grpc
import grpc.aio
from aiorch_proto.v2.service import InferenceStub

from aiorch_client.aio_connection import AsyncConnection, choose_status, note_status
from aiorch_client.calls import RequestLayer
from aiorch_client.channel import TlsConfig
from aiorch_client.client import STREAM_STATUS
from aiorch_client.errors import ClientError, from_status
from aiorch_client.retry import RetryPolicy
from aiorch_client.types import (
    InferRequest,
    InferResult,
    Inputs,
    ModelIndexEntry,
    ModelMetadata,
    ModelStatistics,
    Parameter,
    ServerMetadata,
)


class AsyncClient(AsyncConnection):
    """``Client`` for asyncio: the same calls and arguments, awaited. Belongs to the event loop of its first call.

    Cancelling a call cancels it at the server.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:8001",
        *,
        tls: TlsConfig | None = None,
        token: str | None = None,
        metadata: Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]] = (),
        timeout_s: float = 60.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        super().__init__(target, tls=tls, token=token, metadata=metadata)
        self._layer = RequestLayer(
            timeout_s=timeout_s, retry=retry or RetryPolicy(), clock_s=time.monotonic, draw=random.random
        )

    async def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        version: str = "",
        outputs: Sequence[str] | None = None,
        parameters: Mapping[str, Parameter] | None = None,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> InferResult:
        """As ``Client.infer``."""
        request = InferRequest(model, inputs, version, outputs, parameters or {}, request_id)
        return await self._run(self._layer.infer(request, timeout_s))

    @overload
    def stream(
        self,
        requests: Iterable[InferRequest] | AsyncIterable[InferRequest],
        *,
        timeout_s: float | None = None,
        raise_errors: Literal[True] = True,
    ) -> AsyncIterator[InferResult]: ...

    @overload
    def stream(
        self,
        requests: Iterable[InferRequest] | AsyncIterable[InferRequest],
        *,
        timeout_s: float | None = None,
        raise_errors: Literal[False],
    ) -> AsyncIterator[InferResult | ClientError]: ...

    async def stream(
        self,
        requests: Iterable[InferRequest] | AsyncIterable[InferRequest],
        *,
        timeout_s: float | None = None,
        raise_errors: bool = True,
    ) -> AsyncIterator[InferResult | ClientError]:
        """As ``Client.stream``; ``requests`` may be asynchronous as well and is consumed in a task of its own."""
        self._ensure_open()
        deadline_s = self._layer.start_deadline(timeout_s)
        failures: list[Exception] = []
        call = self._stub.ModelStreamInfer(
            self._prepare_all(requests, deadline_s, failures),
            timeout=deadline_s - time.monotonic(),
            metadata=(*self._metadata, STREAM_STATUS) if raise_errors else self._metadata,
        )
        statuses = note_status(call)
        try:
            async for reply in call:
                item = self._layer.read_stream_reply(reply)
                if raise_errors and isinstance(item, ClientError):
                    raise item
                yield item
        except grpc.RpcError as error:
            raise from_status(*choose_status(statuses, error)) from error
        finally:
            call.cancel()
        if failures:
            raise failures[0]

    async def metadata(self, model: str, version: str = "", *, timeout_s: float | None = None) -> ModelMetadata:
        """As ``Client.metadata``."""
        return await self._run(self._layer.metadata(model, version, timeout_s=timeout_s))

    async def config(self, model: str, version: str = "", *, timeout_s: float | None = None) -> dict[str, Any]:
        """As ``Client.config``."""
        return await self._run(self._layer.config(model, version, timeout_s=timeout_s))

    async def statistics(
        self, model: str = "", version: str = "", *, timeout_s: float | None = None
    ) -> tuple[ModelStatistics, ...]:
        """As ``Client.statistics``."""
        return await self._run(self._layer.statistics(model, version, timeout_s))

    async def is_live(self, *, timeout_s: float | None = None) -> bool:
        """As ``Client.is_live``."""
        return await self._run(self._layer.is_live(timeout_s))

    async def is_ready(self, *, timeout_s: float | None = None) -> bool:
        """As ``Client.is_ready``."""
        return await self._run(self._layer.is_ready(timeout_s))

    async def is_model_ready(self, model: str, version: str = "", *, timeout_s: float | None = None) -> bool:
        """As ``Client.is_model_ready``."""
        return await self._run(self._layer.is_model_ready(model, version, timeout_s))

    async def server_metadata(self, *, timeout_s: float | None = None) -> ServerMetadata:
        """As ``Client.server_metadata``."""
        return await self._run(self._layer.server_metadata(timeout_s))

    async def index(self, *, ready_only: bool = False, timeout_s: float | None = None) -> tuple[ModelIndexEntry, ...]:
        """As ``Client.index``."""
        return await self._run(self._layer.index(ready_only, timeout_s))

    async def load(
        self,
        model: str,
        *,
        config: Mapping[str, Any] | str | None = None,
        files: Mapping[str, bytes] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """As ``Client.load``."""
        await self._run(self._layer.load(model, config, files, timeout_s))

    async def unload(self, model: str, *, unload_dependents: bool = False, timeout_s: float | None = None) -> None:
        """As ``Client.unload``."""
        await self._run(self._layer.unload(model, unload_dependents, timeout_s))

    def _use(self, channel: Any) -> None:
        self._stub = InferenceStub(channel)

    def _find(self, method: str) -> Any:
        return getattr(self._stub, method)

    async def _prepare_all(
        self,
        requests: Iterable[InferRequest] | AsyncIterable[InferRequest],
        deadline_s: float,
        failures: list[Exception],
    ) -> AsyncIterator[Any]:
        try:
            if isinstance(requests, AsyncIterable):
                async for request in requests:
                    yield await self._run(self._layer.prepare(request, deadline_s))
            else:
                for request in requests:
                    yield await self._run(self._layer.prepare(request, deadline_s))
        except Exception as error:  # kept for the reader: in gRPC's task nobody would see it
            failures.append(error)
