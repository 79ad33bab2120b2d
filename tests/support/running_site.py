"""The whole server on a thread of this process, with identity models: for tests that bring clients of their own."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvloop
from patience import PATIENCE

from aiorch_server._core import decode_response, encode_request
from aiorch_server.app import Application
from aiorch_server.config.server import ServerConfig

TIMEOUT_S = 20.0 * PATIENCE
SERVICE = "inference.GRPCInferenceService"
INFER = f"/{SERVICE}/ModelInfer"

#: identity echoes FP32 rows. A request to gate waits in its queue until a second one comes, or its caller gives up.
MODELS = {
    "identity": """
        backend: "identity" max_batch_size: 8
        input { name: "INPUT0" data_type: TYPE_FP32 dims: [-1] }
        output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [-1] }
        dynamic_batching { max_queue_delay_microseconds: 100 }
    """,
    "gate": """
        backend: "identity" max_batch_size: 2
        input { name: "INPUT0" data_type: TYPE_FP32 dims: [-1] }
        output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [-1] }
        dynamic_batching { preferred_batch_size: [2] max_queue_delay_microseconds: 60000000 }
    """,
}


def write_models(root: Path) -> Path:
    for name, config in MODELS.items():
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(config)
    return root


def encode_values(values: Sequence[float], model: str = "identity", version: str = "", id: str = "") -> bytes:
    """A ModelInferRequest with one row."""
    data = struct.pack(f"<{len(values)}f", *values)
    return encode_request(model, version, id, [("INPUT0", "FP32", (1, len(values)), data)])


def decode_values(message: bytes) -> list[float]:
    """The row of a ModelInferResponse."""
    _, _, _, ((name, datatype, shape, data),) = decode_response(message)
    assert (name, datatype, shape[0], len(shape)) == ("OUTPUT0", "FP32", 1, 2)
    return list(struct.unpack(f"<{shape[1]}f", data))


class Site:
    """A running server over ``models``; sections of the configuration may be given."""

    def __init__(self, models: Path, *, io_threads: int, grpc: dict[str, Any] | None = None, **sections: Any) -> None:
        self.config = ServerConfig.model_validate(
            {
                # any number of PINGs: the policy against them has tests of its own
                "grpc": {
                    "host": "127.0.0.1",
                    "port": 0,
                    "io_threads": io_threads,
                    "http2_max_ping_strikes": 0,
                    **(grpc or {}),
                },
                "http": {"host": "127.0.0.1", "port": 0},
                "metrics": {"enabled": False},
                "repository": {"paths": [str(models)]},
                "execution": {"backends": ["aiorch_backends.identity:IdentityBackend"]},
                **sections,
            }
        )
        self.problems: list[dict[str, Any]] = []
        self.loop = uvloop.new_event_loop()
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))
        self._thread = threading.Thread(target=self._run_loop, name="site")
        self._thread.start()
        self.application = self.run(self._start())

    async def _start(self) -> Application:
        application = Application(self.config)
        await application.start()
        return application

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)

    @property
    def port(self) -> int:
        assert self.application.grpc_port is not None
        return int(self.application.grpc_port)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.application.http_port}"

    def begin_stop(self, grace_s: float) -> Any:
        """A concurrent future of the drain."""
        return asyncio.run_coroutine_threadsafe(self.application.stop(grace_s), self.loop)

    def count_pending(self, model: str = "gate") -> int:
        """Requests in a model's queue."""
        (servable,) = (each for each in self.application.manager.servables() if each.name == model)
        return int(servable.scheduler.pending)

    def close(self) -> None:
        self.begin_stop(0.0).result(TIMEOUT_S)
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        self.loop.close()
        assert not self.problems, self.problems
