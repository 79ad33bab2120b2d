import asyncio
from collections.abc import Sequence

from typing_extensions import Buffer

from aiorch_server._core.scheduler import Scheduler
from aiorch_server.types import PhaseStamps

class Mailbox:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None: ...
    def submit(
        self,
        scheduler: Scheduler,
        message: bytes,
        contents: Sequence[Buffer] | None = None,
        *,
        priority: int = 0,
        timeout_us: int = 0,
        deadline_ns: int = 0,
        attachment: object = None,
        stamps: PhaseStamps | None = None,
        trace: bytes | None = None,
        tenant: int = 0,
        weight: float = 1.0,
    ) -> asyncio.Future[memoryview]: ...
    def collect(self) -> None: ...
    def close(self) -> None: ...
