"""Requests of sequences: the same messages, with a correlation id and the flags of their place."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator

from aiorch_proto.v2 import inference_pb2 as pb


class SequenceIds:
    """Correlation ids that neither this run nor another one at the same time gives twice."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = itertools.count(secrets.randbits(61) + 1)

    def take(self) -> int:
        """The next one, from 1 to what fits into int64."""
        return next(self._numbers)


class Sequence:
    """One sequence of a caller, ``length`` requests long: adds to a serialised request what makes it the next one."""

    def __init__(self, correlation_id: int, length: int) -> None:
        self._id, self._length, self._sent = correlation_id, length, 0

    @property
    def is_open(self) -> bool:
        """Whether it has begun and not ended."""
        return 0 < self._sent < self._length

    @property
    def is_over(self) -> bool:
        """Whether its last request was taken."""
        return self._sent >= self._length

    def take(self, request: bytes, *, is_last: bool = False) -> bytes:
        """``request`` as the next of the sequence; ``is_last`` ends it before its length."""
        is_start = self._sent == 0
        self._sent = self._length if is_last else self._sent + 1
        place = pb.ModelInferRequest()
        place.parameters["sequence_id"].int64_param = self._id
        place.parameters["sequence_start"].bool_param = is_start
        place.parameters["sequence_end"].bool_param = self.is_over
        # serialised messages one after the other are one message (protobuf's encoding: "Last One Wins", maps merge)
        return b"".join((request, place.SerializeToString()))
