import asyncio

from aiorch_server._core.scheduler import Scheduler

class Mailbox:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None: ...
    def submit(
        self,
        scheduler: Scheduler,
        message: bytes,
        *,
        priority: int = 0,
        timeout_us: int = 0,
        deadline_ns: int = 0,
    ) -> asyncio.Future[bytes]: ...
    def collect(self) -> None: ...
    def close(self) -> None: ...
