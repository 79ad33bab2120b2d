"""An application in this process with both of its ports, for TensorFlow Serving's protocol."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from aiorch_proto.tfserving import serving_pb2 as pb
from aiorch_proto.tfserving.service import METHODS

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig

TIMEOUT_S = 20.0


@dataclass
class Site:
    """A running application, plain stubs of both services, and a plain HTTP client."""

    application: Application
    channel: grpc.aio.Channel
    http: httpx.AsyncClient
    calls: dict[str, Any]

    async def predict(self, model: str, inputs: Mapping[str, Any], **spec: Any) -> pb.PredictResponse:
        request = pb.PredictRequest(model_spec={"name": model, **spec}, inputs=inputs)
        return await self.calls["Predict"](request, timeout=TIMEOUT_S)

    async def refused(self, method: str, request: Any) -> tuple[str, str]:
        """The status of a call that must fail."""
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await self.calls[method](request, timeout=TIMEOUT_S)
        return raised.value.code().name, str(raised.value.details())

    async def wait_idle(self) -> None:
        """Until no request is queued, running or holding a lease; whatever is left then was lost."""
        async with asyncio.timeout(TIMEOUT_S):
            while any(servable.pending for servable in self.application.manager.servables()):
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serve_here(repository: Path, door: str, **sections: Any) -> AsyncIterator[Site]:
    transport, _, threads = door.partition("-")
    config = {
        "grpc": {"port": 0, "transport": transport, "io_threads": int(threads or 1), "max_message_bytes": 1 << 20},
        "http": {"port": 0, "max_body_bytes": 1 << 20},
        "metrics": {"enabled": False},
        "repository": {"paths": [str(repository)]},
        "execution": {"backends": ["aiorch_backends.identity:IdentityBackend"]},
        **sections,
    }
    async with contextlib.AsyncExitStack() as stack:
        application = await stack.enter_async_context(Application(ServerConfig.model_validate(config)))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{application.grpc_port}"))
        url = f"http://127.0.0.1:{application.http_port}"
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S))
        calls = {
            name: channel.unary_unary(
                method.path,
                request_serializer=lambda request: (
                    request if isinstance(request, bytes) else request.SerializeToString()
                ),
                response_deserializer=method.response.FromString,
            )
            for name, method in METHODS.items()
        }
        site = Site(application, channel, http, calls)
        yield site
        await site.wait_idle()
