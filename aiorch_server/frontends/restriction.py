"""Which calls need a header: the one rule of all doors. What belongs to which group is said where calls are found.

Triton's: docs/customization_guide/inference_protocols.md, "Limit Endpoint Access".
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Final

from aiorch_server.config.restriction import Group, Restriction
from aiorch_server.errors import Code, RequestError

GRPC_PREFIX: Final = "triton-grpc-protocol-"


class AccessRestricted(RequestError):
    """The call needs a header that it does not have; Triton answers UNAVAILABLE over gRPC, and 403 over HTTP."""

    code = Code.UNAVAILABLE


class AccessRules:
    """The restrictions of one door; without any, all is open. ``kind`` is what its calls are called in refusals."""

    def __init__(self, restrictions: Iterable[Restriction] = (), *, kind: str = "API", prefix: str = "") -> None:
        self._kind = kind
        # The name that is told, the one that is compared, and the value.
        self._headers: dict[Group, tuple[str, bytes, bytes]] = {}
        for restriction in restrictions:
            name = f"{prefix}{restriction.key}"
            secret = restriction.value.get_secret_value().encode("ascii")
            for group in restriction.groups:
                self._headers[group] = (name, name.lower().encode("ascii"), secret)

    @classmethod
    def for_grpc(cls, restrictions: Iterable[Restriction]) -> AccessRules:
        """The rules of a gRPC door, where names of metadata have no capitals."""
        lowered = (each.model_copy(update={"key": each.key.lower()}) for each in restrictions)
        return cls(lowered, kind="protocol", prefix=GRPC_PREFIX)

    def is_open(self, groups: Iterable[Group]) -> bool:
        """Whether no header is needed for calls of all these groups."""
        return self._headers.keys().isdisjoint(groups)

    def find_refusal(self, groups: Iterable[Group], headers: Iterable[tuple[bytes, bytes]]) -> AccessRestricted | None:
        """Why a call of all ``groups`` with these headers (names in lower case) is refused, None if it is not.

        A header that is there more than once must be right each time: who is in front of us may have gone by another.
        """
        if not self._headers:
            return None
        for group in groups:
            if (wanted := self._headers.get(group)) is None:
                continue
            told, name, secret = wanted
            matches = [hmac.compare_digest(value, secret) for key, value in headers if key == name]
            if not matches or not all(matches):
                return AccessRestricted(f"This {self._kind} is restricted, expecting header '{told}'")
        return None

    def check(self, groups: Iterable[Group], headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raises what ``find_refusal`` finds."""
        if (refusal := self.find_refusal(groups, headers)) is not None:
            raise refusal
