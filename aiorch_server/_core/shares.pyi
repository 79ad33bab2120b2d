from collections.abc import Iterable

class Shares:
    """Where the requests go that name no version; see shares.pxd."""

    def __init__(
        self,
        shares: Iterable[tuple[int, int]],
        *,
        is_sticky: bool = False,
        sampled: int = 0,
        after: Shares | None = None,
    ) -> None: ...
    @property
    def versions(self) -> tuple[int, ...]: ...
    @property
    def turns(self) -> int: ...
    def choose(self, key: bytes = b"", *, is_kept: bool = False) -> tuple[int, bool]: ...
