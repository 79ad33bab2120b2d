from collections.abc import Iterable, Sequence

class BatchFormer:
    def __init__(
        self, max_rows: int, *, delay_ns: int = 0, preferred: Iterable[int] = (), run_ns: int = 0, n_key: int = 1
    ) -> None: ...
    def __len__(self) -> int: ...
    def push(
        self,
        now_ns: int,
        *,
        rows: int = 1,
        shape: Sequence[int] = (0,),
        level: int = 0,
        deadline_ns: int = 0,
        expires_ns: int = 0,
    ) -> int: ...
    def cancel(self, ticket: int) -> None: ...
    def expire(self, now_ns: int) -> list[int]: ...
    def form(self, now_ns: int) -> tuple[list[int], int, int]: ...
