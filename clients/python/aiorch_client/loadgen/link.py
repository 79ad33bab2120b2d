"""One connection of a load run: sends requests, and knows whether it still leads anywhere."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
from aiorch_proto.v2 import inference_pb2 as pb

from aiorch_client.loadgen.plan import LoadPlan
from aiorch_client.loadgen.result import LOST

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # without it, channels to one address share one connection
    ("grpc.enable_retries", 0),  # each request is sent once: a retry would hide an error and count twice
)
_OK, _UNAVAILABLE = grpc.StatusCode.OK.value[0], grpc.StatusCode.UNAVAILABLE.value[0]


class Link:
    """A channel of its own to the plan's target, used as a context; for one event loop."""

    def __init__(self, plan: LoadPlan) -> None:
        self._plan = plan
        self._metadata = tuple(plan.metadata)
        if plan.credentials is None:
            self._channel = grpc.aio.insecure_channel(plan.target, options=_CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(plan.target, plan.credentials, options=_CHANNEL_OPTIONS)
        self._unary: Any = self._channel.unary_unary(plan.path)
        self._streamed: Any = self._channel.stream_stream(plan.path)
        self._return: asyncio.Task[bool] | None = None

    async def __aenter__(self) -> Link:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._return is not None:
            self._return.cancel()
            await asyncio.gather(self._return, return_exceptions=True)
        await self._channel.close()

    async def connect(self) -> None:
        """Returns when there is a connection."""
        await self._channel.channel_ready()

    async def send(self, request: bytes) -> tuple[int, bytes]:
        """Status and answer (of a streamed plan the last one) of one request; LOST where the connection broke."""
        plan = self._plan
        try:
            if not plan.is_streamed:
                return _OK, await self._unary(request, timeout=plan.timeout_s, metadata=self._metadata)
            answer = b""
            async for answer in self._streamed(_one(request), timeout=plan.timeout_s, metadata=self._metadata):
                if pb.ModelStreamInferResponse.FromString(answer).error_message:
                    return grpc.StatusCode.UNKNOWN.value[0], answer
            return _OK, answer
        except grpc.aio.AioRpcError as error:
            code: int = error.code().value[0]
            # a server that refuses is still there
            return (LOST if code == _UNAVAILABLE and not self._is_connected() else code), b""

    async def returns(self) -> bool:
        """Whether the connection is there again within ``connect_timeout_s``; callers wait for the same attempt."""
        if self._return is None or (self._return.done() and self._return.result()):
            self._return = asyncio.create_task(self._await_return())
        return await asyncio.shield(self._return)

    async def _await_return(self) -> bool:
        try:
            async with asyncio.timeout(self._plan.connect_timeout_s):
                await self._channel.channel_ready()
        except TimeoutError:
            return False
        return True

    def _is_connected(self) -> bool:
        return self._channel.get_state() is grpc.ChannelConnectivity.READY


async def _one(request: bytes) -> Any:
    yield request
