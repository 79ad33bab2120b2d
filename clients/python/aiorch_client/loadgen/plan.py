"""What to offer to a server, and for how long."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from aiorch_client.loadgen.arrivals import Arrival

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
MODEL_STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One load run; checked when made, ValueError names every problem at once.

    ``requests`` are serialised request messages, sent in turn. ``rate`` None means a closed loop of ``channels`` x
    ``streams`` callers, each with one request under way; otherwise an open loop at ``rate`` requests/s, spread over
    ``channels`` connections. An open loop never has more than ``max_in_flight`` requests under way: later ones leave
    late, and their latency counts from the time they were due. ``due_ns`` instead of ``rate`` gives those times one by
    one, ascending from the start; what is due after the end is left out. ``warm_up_s`` of the same load comes first and
    is left out of the figures. Every request has the deadline ``timeout_s``, so a run ends after
    ``warm_up_s + duration_s + 2 x (connect_timeout_s + timeout_s)`` at the latest. ``max_requests`` bounds memory (26
    bytes each): a closed loop stops there, an open loop that needs more is refused.

    ``sequence_length`` above 0 makes each caller of a closed loop send sequences of so many requests, with correlation
    ids of their own; one that fails is given up, one that the run's end cuts short gets a last request. A plan whose
    ``path`` is MODEL_STREAM_INFER opens one stream per request, which is answered when the stream ends.

    Where the connection breaks, requests without an answer count as LOST, and no further ones are sent until it is
    there again; if it is not within ``connect_timeout_s``, the run ends.

    ``check(index, response)`` is called with the index of the request in ``requests`` and the response's bytes, and
    says whether the answer is right; it runs in the generator's thread, so keep it short.
    """

    target: str
    requests: Sequence[bytes]
    duration_s: float = 10.0
    warm_up_s: float = 1.0
    channels: int = 1
    streams: int = 1
    rate: float | None = None
    arrival: Arrival = Arrival.POISSON
    burst_on_s: float = 0.1
    burst_off_s: float = 0.4
    seed: int = 0
    timeout_s: float = 30.0
    connect_timeout_s: float = 5.0
    max_in_flight: int = 10_000
    max_requests: int = 10_000_000
    path: str = MODEL_INFER
    sequence_length: int = 0
    metadata: Sequence[tuple[str, str | bytes]] = ()
    credentials: grpc.ChannelCredentials | None = None
    check: Callable[[int, bytes], bool] | None = None
    due_ns: Sequence[int] | None = None

    def __post_init__(self) -> None:
        problems = [text for is_wrong, text in self._find_problems() if is_wrong]
        if problems:
            raise ValueError("load plan: " + "; ".join(problems))

    @property
    def is_open(self) -> bool:
        """Whether requests come at fixed times (open loop) rather than after the last answer (closed loop)."""
        return self.rate is not None or self.due_ns is not None

    @property
    def is_streamed(self) -> bool:
        """Whether a request may have any number of answers."""
        return self.path == MODEL_STREAM_INFER

    @property
    def total_s(self) -> float:
        """Seconds in which requests are sent: warm-up and measured window."""
        return self.warm_up_s + self.duration_s

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values, without message bytes, metadata or credentials."""
        shared: dict[str, Any] = {
            "loop": "open" if self.is_open else "closed",
            "target": self.target,
            "path": self.path,
            "requests": len(self.requests),
            "request_bytes": max(len(request) for request in self.requests),
            "duration_s": self.duration_s,
            "warm_up_s": self.warm_up_s,
            "channels": self.channels,
            "timeout_s": self.timeout_s,
        }
        if self.sequence_length:
            shared |= {"sequence_length": self.sequence_length}
        if not self.is_open:
            return shared | {"streams": self.streams}
        if self.due_ns is not None:
            return shared | {"due": len(self.due_ns), "max_in_flight": self.max_in_flight}
        opened = {"rate": self.rate, "arrival": self.arrival.value, "seed": self.seed}
        if self.arrival is Arrival.BURST:
            opened |= {"burst_on_s": self.burst_on_s, "burst_off_s": self.burst_off_s}
        return shared | opened | {"max_in_flight": self.max_in_flight}

    def _find_problems(self) -> list[tuple[bool, str]]:
        expected = self.total_s * (self.rate or 0.0) if self.due_ns is None else len(self.due_ns)
        return [
            (not self.target, "target is empty, expected 'host:port'"),
            (not self.requests, "requests is empty, expected at least one serialised message"),
            (not self.path.startswith("/"), f"path is '{self.path}', expected '/package.Service/Method'"),
            (self.due_ns is not None and self.rate is not None, "due_ns and rate both say when; leave one out"),
            (
                any(after < before for before, after in itertools.pairwise((0, *(self.due_ns or ())))),
                "due_ns must ascend from 0 on",
            ),
            (self.sequence_length < 0, f"sequence_length is {self.sequence_length}, expected >= 0"),
            (
                self.sequence_length > 0 and self.is_open,
                "sequences are for a closed loop, whose callers wait for an answer before they go on; leave rate out",
            ),
            (self.warm_up_s < 0 or not math.isfinite(self.warm_up_s), f"warm_up_s is {self.warm_up_s}, expected >= 0"),
            *[
                (not (0 < value < math.inf), f"{name} is {value}, expected > 0")
                for name, value in (
                    ("duration_s", self.duration_s),
                    ("timeout_s", self.timeout_s),
                    ("connect_timeout_s", self.connect_timeout_s),
                    ("rate", 1.0 if self.rate is None else self.rate),
                    ("burst_on_s", self.burst_on_s),
                    ("burst_off_s", self.burst_off_s),
                    ("channels", self.channels),
                    ("streams", self.streams),
                    ("max_in_flight", self.max_in_flight),
                    ("max_requests", self.max_requests),
                )
            ],
            (
                math.isfinite(expected) and expected > self.max_requests,
                f"rate x time is {expected:.0f} requests, more than max_requests {self.max_requests}",
            ),
        ]
