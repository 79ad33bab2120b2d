from collections.abc import Iterable, Sequence

class BatchFormer:
    def __init__(
        self,
        max_rows: int,
        *,
        delay_ns: int = 0,
        preferred: Iterable[int] = (),
        run_ns: int = 0,
        n_key: int = 1,
        target_ns: int = 0,
        margin_ns: int = 0,
        is_deferring: bool = False,
        is_shedding: bool = False,
        instances: int = 1,
        curve: Sequence[tuple[int, int]] = (),
    ) -> None: ...
    def __len__(self) -> int: ...
    def set_policy(
        self,
        *,
        max_rows: int | None = None,
        delay_ns: int | None = None,
        target_ns: int | None = None,
        margin_ns: int | None = None,
        is_deferring: bool | None = None,
        is_shedding: bool | None = None,
        instances: int | None = None,
        curve: Sequence[tuple[int, int]] | None = None,
    ) -> None: ...
    def push(
        self,
        now_ns: int,
        *,
        rows: int = 1,
        shape: Sequence[int] = (0,),
        level: int = 0,
        deadline_ns: int = 0,
        expires_ns: int = 0,
        received_ns: int | None = None,
    ) -> int: ...
    def admit(
        self,
        now_ns: int,
        free_ns: Sequence[int],
        *,
        tenant: int = 0,
        weight: float = 1.0,
        max_waiting: int = 16384,
        rows: int = 1,
        shape: Sequence[int] = (0,),
        level: int = 0,
        deadline_ns: int = 0,
        expires_ns: int = 0,
        received_ns: int | None = None,
    ) -> tuple[int, list[int]]: ...
    def foretell(
        self,
        now_ns: int,
        free_ns: Sequence[int],
        *,
        rows: int = 1,
        shape: Sequence[int] = (0,),
        level: int = 0,
        deadline_ns: int = 0,
        received_ns: int | None = None,
    ) -> tuple[int, int]: ...
    def cancel(self, ticket: int) -> None: ...
    def expire(self, now_ns: int) -> list[int]: ...
    def drop_late(self, now_ns: int) -> list[int]: ...
    def form(self, now_ns: int) -> tuple[list[int], int, int]: ...
