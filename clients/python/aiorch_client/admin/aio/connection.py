"""What the parts of the asyncio admin client share."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import grpc
import grpc.aio
from aiorch_proto.admin.v1.service import AdminStub

from aiorch_client.admin.calls import ADMIN_RETRIES, AdminLayer, Call, ListCall
from aiorch_client.admin.push import SendArchive
from aiorch_client.aio_connection import AsyncConnection, choose_status, note_status
from aiorch_client.channel import TlsConfig
from aiorch_client.retry import RetryPolicy
from aiorch_client.steps import Send

T = TypeVar("T")
Item = TypeVar("Item")


class AsyncAdminConnection(AsyncConnection):
    """``AdminConnection`` for asyncio."""

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
        self._layer = AdminLayer(
            timeout_s=timeout_s, retry=retry or ADMIN_RETRIES, clock_s=time.monotonic, draw=random.random
        )

    async def _call(self, call: Call[T], timeout_s: float | None) -> T:
        return await self._run(self._layer.call(call, timeout_s))

    async def _list(self, call: ListCall[Item], timeout_s: float | None) -> AsyncIterator[Item]:
        token = ""
        while True:
            items, token = await self._run(self._layer.list_page(call, token, timeout_s))
            for item in items:
                yield item
            if not token:
                return

    def _use(self, channel: Any) -> None:
        self._stub = AdminStub(channel)

    def _find(self, method: str) -> Any:
        service, _, name = method.partition(".")
        return getattr(getattr(self._stub, service), name)

    async def _invoke(self, step: Send) -> Any:
        if not isinstance(step, SendArchive):
            return await super()._invoke(step)
        self._ensure_open()
        failures: list[Exception] = []
        messages = _read_on_threads(step.messages(failures))
        call = self._find(step.method)(messages, timeout=step.timeout_s, metadata=self._metadata)
        statuses = note_status(call)
        try:
            return await self._answer(call)
        except grpc.RpcError as error:
            if failures:
                raise failures[0] from None
            code, details, trailing_metadata = choose_status(statuses, error)
            raise grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing_metadata, details) from error
        finally:
            call.cancel()


async def _read_on_threads(messages: Iterator[Any]) -> AsyncIterator[Any]:
    """``messages``, which read files, without holding up the loop."""
    while (message := await asyncio.to_thread(next, messages, None)) is not None:
        yield message
