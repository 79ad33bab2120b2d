"""The shares of a model's versions, as the control plane sets them and the compiled route table carries them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from aiorch_server.tracing import ROUTE_KEY as ROUTE_KEY

#: All requests, in hundredths of a percent.
WHOLE: Final = 10_000


@dataclass(frozen=True, slots=True)
class Share:
    """A version's part of the requests, in hundredths of a percent."""

    version: int
    share: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """Where the requests of one model go that name no version.

    ``shares`` add up to ``WHOLE`` (ValueError otherwise); looks at the model without version are answered for the first
    of them that is ready and not 0. ``is_sticky``: a request with a key (metadata or header ``ROUTE_KEY``) always goes
    where its key goes; a version whose share grows at the others' cost keeps all keys that it has. ``sampled`` is the
    part of these requests that the compiled path leaves to the control plane, whose observers (``Samples``) may copy or
    record them; each version has its share of it.
    """

    shares: tuple[Share, ...]
    is_sticky: bool = False
    sampled: int = 0

    def __post_init__(self) -> None:
        total = sum(each.share for each in self.shares)
        if total != WHOLE or any(not 0 <= each.share <= WHOLE for each in self.shares):
            raise ValueError(
                f"shares {[each.share for each in self.shares]} must be 0 to {WHOLE} and add up to {WHOLE}"
            )
        if len({each.version for each in self.shares}) != len(self.shares):
            raise ValueError(f"versions {[each.version for each in self.shares]} must differ")
        if not 0 <= self.sampled <= WHOLE:
            raise ValueError(f"sampled is {self.sampled}; it must be 0 to {WHOLE}")
