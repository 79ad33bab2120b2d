"""An application that asks who calls, on the test's own loop, with callers of every kind."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
from running_site import encode_values

from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig
from aiorch_server.security.api_keys import NewKey, make_key

#: gRPC by I/O thread, by the event loop, and by grpcio.
DOORS = ("native-1", "native-0", "grpcio")
SERVICE = "/inference.GRPCInferenceService"
INFER = f"{SERVICE}/ModelInfer"
TIMEOUT_S = 20.0
IDENTITY = """
    backend: "identity" max_batch_size: 8
    input { name: "INPUT0" data_type: TYPE_FP32 dims: [-1] }
    output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [-1] }
    dynamic_batching { max_queue_delay_microseconds: 100 }
    parameters { key: "tuning" value { string_value: "off" } }
"""
#: Who may do what on the models own-*; the last has no role at all.
ROLES = {
    **{name: {"role": name, "models": "own-*"} for name in ("viewer", "client", "deployer", "admin")},
    "root": {"role": "admin"},
    "nothing": None,
}
KEYS = {name: make_key() for name in ROLES}


def write_models(root: Path) -> Path:
    for name in ("own-one", "other-one"):
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(IDENTITY)
    return root


def list_keys() -> list[dict[str, Any]]:
    return [{"id": key.id, "sha256": key.sha256.hex(), "principal": name} for name, key in KEYS.items()]


def list_bindings() -> list[dict[str, Any]]:
    return [{"principal": name, **given} for name, given in ROLES.items() if given is not None]


@dataclass
class Answer:
    """What came back, as far as two answers can be compared."""

    code: str
    text: str
    data: bytes = b""
    trailing: dict[str, Any] = field(default_factory=dict)


@dataclass
class Secured:
    """A running application and its callers."""

    application: Application
    channel: grpc.aio.Channel
    http: httpx.AsyncClient

    async def call(self, path: str, message: bytes = b"", caller: str | NewKey | None = None, **more: Any) -> Answer:
        """One request over gRPC, of whatever kind the method is; the first answer counts."""
        metadata = [("authorization", f"Bearer {key_of(caller)}")] if caller is not None else []
        metadata += more.get("metadata", [])
        call = self.channel.unary_stream(path)(message, metadata=metadata, timeout=TIMEOUT_S)
        answers, trailing = [], {}
        try:
            async for answer in call:
                answers.append(answer)
                if path.endswith("/Watch"):
                    call.cancel()
                    break
            code, text = ("OK", "") if path.endswith("/Watch") else (await call.code(), await call.details())
        except grpc.aio.AioRpcError as error:
            code, text, trailing = error.code(), error.details(), dict(error.trailing_metadata())
        return Answer(getattr(code, "name", str(code)), str(text), b"".join(answers), trailing)

    async def infer(self, caller: str | NewKey | None, model: str = "own-one", **more: Any) -> Answer:
        return await self.call(INFER, encode_values([1.0, 2.0], model), caller, **more)

    async def ask(self, method: str, path: str, caller: str | NewKey | None = None, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key_of(caller)}"} if caller is not None else {}
        return await self.http.request(method, path, headers={**headers, **more.pop("headers", {})}, **more)

    def count_compiled(self) -> int:
        """Requests that the compiled door has taken by itself would not be seen by the gate: how often it was asked."""
        return len(self.application._gate._remembered)  # type: ignore[union-attr]


def key_of(caller: str | NewKey) -> str:
    if isinstance(caller, NewKey):
        return caller.text
    return KEYS[caller].text if caller in KEYS else caller


@contextlib.asynccontextmanager
async def serve_secured(
    models: Path,
    door: str = "native-1",
    *,
    security: Any = None,
    credentials: Any = None,
    verify: Any = True,
    **more: Any,
) -> AsyncIterator[Secured]:
    """``more`` are sections beside those that are needed; ``credentials`` and ``verify`` where doors speak TLS."""
    transport, _, threads = door.partition("-")
    config: dict[str, Any] = {
        "grpc": {"port": 0, "transport": transport, "io_threads": int(threads or 1), **more.pop("grpc", {})},
        "http": {"port": 0, **more.pop("http", {})},
        "metrics": {"port": 0, **more.pop("metrics", {})},
        "repository": {"paths": [str(models)]},
        "lifecycle": {"control_mode": "explicit", "load_models": ["*"]},
        "execution": {"backends": ["aiorch_backends.identity:IdentityBackend"]},
        "security": {"enabled": True, "api_keys": list_keys(), "bindings": list_bindings(), **(security or {})},
        **more,
    }
    async with contextlib.AsyncExitStack() as stack:
        application = await stack.enter_async_context(Application(ServerConfig.model_validate(config)))
        target = f"localhost:{application.grpc_port}"
        channel = grpc.aio.secure_channel(target, credentials) if credentials else grpc.aio.insecure_channel(target)
        await stack.enter_async_context(channel)
        has_tls = "tls" in config["http"]
        url = f"{'https' if has_tls else 'http'}://localhost:{application.http_port}"
        http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, verify=verify)
        yield Secured(application, channel, await stack.enter_async_context(http))
