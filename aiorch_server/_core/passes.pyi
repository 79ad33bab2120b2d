from aiorch_server._core.quota import Quota

class Passes:
    """Which credentials may call which model, as decided before; what compiled doors let through. Any thread."""

    def __init__(self, *, max_entries: int = ..., max_bytes: int = ...) -> None: ...
    @property
    def generation(self) -> int: ...
    @property
    def entries(self) -> int: ...
    @property
    def used_bytes(self) -> int: ...
    @property
    def evicted(self) -> int: ...
    def add(
        self,
        credential: bytes,
        model: str,
        *,
        expires_ns: int,
        generation: int,
        quota: Quota | None = None,
        tenant: int = 0,
        weight: float = 1.0,
        is_certificate: bool = False,
    ) -> bool: ...
    def holds(self, credential: bytes, model: str, now_ns: int, *, is_certificate: bool = False) -> bool: ...
    def clear(self) -> None: ...

def hash_credential(key: bytes, data: bytes) -> int: ...
