from collections.abc import Iterable, Sequence

from aiorch_server._core.collate import Batch
from aiorch_server._core.spec import ModelSpec
from aiorch_server.types import SchedulerCounters

DEFAULT_MAX_REQUESTS: int
DEFAULT_MAX_BYTES: int

class Scheduler:
    spec: ModelSpec
    def __init__(
        self,
        spec: ModelSpec,
        *,
        max_queue_delay_us: int = 0,
        preferred_batch_sizes: Iterable[int] = (),
        max_queue_size: int = 0,
        max_queue_bytes: int = 0,
        priority_levels: int = 0,
        default_priority_level: int = 0,
        default_timeout_us: int = 0,
        allow_timeout_override: bool = False,
        delay_expired: bool = False,
        level_policies: Sequence[tuple[int, int, bool, bool]] = (),
        preserve_ordering: bool = False,
    ) -> None: ...
    @property
    def pending(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def is_closed(self) -> bool: ...
    def take(self, batch: Batch) -> bool: ...
    def close(self) -> None: ...
    def abandon(self, code: int, text: str) -> None: ...
    def wait_idle(self, timeout_s: float) -> bool: ...
    def counters(self) -> SchedulerCounters: ...
