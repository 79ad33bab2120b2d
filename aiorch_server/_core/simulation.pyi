import enum
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

class Fate(enum.IntFlag):
    LATE_AT_DOOR = -1
    LATE_IN_QUEUE = -2
    NO_ROOM = -3
    EXPIRED = -4

class Simulation:
    latencies_ns: npt.NDArray[np.int64]
    batch_of: npt.NDArray[np.int64]
    def __init__(
        self,
        arrivals_ns: npt.NDArray[np.int64],
        *,
        truth: Sequence[tuple[int, int]],
        rows: npt.NDArray[np.int64] | None = None,
        levels: npt.NDArray[np.int64] | None = None,
        deadlines_ns: npt.NDArray[np.int64] | None = None,
        shapes: npt.NDArray[np.int64] | None = None,
        max_rows: int = 1,
        delay_ns: int = 0,
        target_ns: int = 0,
        margin_ns: int = 0,
        preferred: Sequence[int] = (),
        is_deferring: bool = False,
        is_shedding: bool = False,
        curve: Sequence[tuple[int, int]] = (),
        instances: int = 1,
        max_waiting: int = 16384,
        expiry_ns: int = 0,
        spreads: Sequence[float] = (),
        noise: npt.NDArray[np.float64] | None = None,
        slowdowns: Sequence[float] = (),
        cores: float = 64.0,
        door_ns: int = 0,
        answer_ns: int = 0,
        wake_ns: int = 0,
        stall_gaps_ns: npt.NDArray[np.int64] | Sequence[int] = (),
        stalls_ns: npt.NDArray[np.int64] | Sequence[int] = (),
    ) -> None: ...
    def advance(self, until_ns: int | None = None) -> None: ...
    def set_policy(
        self,
        *,
        max_rows: int | None = None,
        delay_ns: int | None = None,
        target_ns: int | None = None,
        margin_ns: int | None = None,
        is_deferring: bool | None = None,
        is_shedding: bool | None = None,
        curve: Sequence[tuple[int, int]] | None = None,
        instances: int | None = None,
    ) -> None: ...
    @property
    def waiting(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def batch_starts_ns(self) -> npt.NDArray[np.int64]: ...
    @property
    def batch_ends_ns(self) -> npt.NDArray[np.int64]: ...
    @property
    def batch_rows(self) -> npt.NDArray[np.int64]: ...

def simulate(
    arrivals_ns: npt.NDArray[np.int64],
    *,
    truth: Sequence[tuple[int, int]],
    rows: npt.NDArray[np.int64] | None = None,
    levels: npt.NDArray[np.int64] | None = None,
    deadlines_ns: npt.NDArray[np.int64] | None = None,
    shapes: npt.NDArray[np.int64] | None = None,
    max_rows: int = 1,
    delay_ns: int = 0,
    target_ns: int = 0,
    margin_ns: int = 0,
    preferred: Sequence[int] = (),
    is_deferring: bool = False,
    is_shedding: bool = False,
    curve: Sequence[tuple[int, int]] = (),
    instances: int = 1,
    max_waiting: int = 16384,
    expiry_ns: int = 0,
    spreads: Sequence[float] = (),
    noise: npt.NDArray[np.float64] | None = None,
    slowdowns: Sequence[float] = (),
    cores: float = 64.0,
    door_ns: int = 0,
    answer_ns: int = 0,
    wake_ns: int = 0,
    stall_gaps_ns: npt.NDArray[np.int64] | Sequence[int] = (),
    stalls_ns: npt.NDArray[np.int64] | Sequence[int] = (),
) -> Simulation: ...
