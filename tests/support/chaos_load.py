"""Requests without end beside everything else; each answer must be its own, and a sum that one version makes."""

from __future__ import annotations

import random
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import grpc
from chaos_site import Server, Timeline
from patience import PATIENCE

from aiorch_server._core import decode_response, encode_request

INFER = "/inference.GRPCInferenceService/ModelInfer"
TIMEOUT_S = 30.0 * PATIENCE
#: gRPC's own words for a connection that is not there; a server's refusals are in other words.
UNCONNECTED = (
    "failed to connect", "Connection refused", "Connection reset", "Socket closed", "recvmsg", "sendmsg", "Broken pipe",
    "GOAWAY", "Stream removed", "Transport closed", "Connection timed out", "tcp handshaker", "end of stream", "ping",
)  # fmt: skip
#: What is said of a model that is not deployed, or of which no version serves.
GONE = ("is not found", "is not ready", "no available version", "unavailable")


def is_unconnected(error: grpc.RpcError) -> bool:
    """Whether nobody answered."""
    return error.code() is grpc.StatusCode.UNAVAILABLE and any(each in str(error.details()) for each in UNCONNECTED)


def connect(target: str) -> grpc.Channel:
    """A channel that remembers no failures of others to the same address."""
    return grpc.insecure_channel(target, options=(("grpc.use_local_subchannel_pool", 1),))


@dataclass
class Tally:
    """What came of the requests."""

    answered: int = 0
    #: Nobody was there: before a killed server was ready again.
    unconnected: int = 0
    #: Refusals of models that may be out of service.
    refused: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    #: (model, version) -> what it adds.
    sums: dict[tuple[str, int], set[float]] = field(default_factory=lambda: defaultdict(set))


class Asker:
    """One connection to one server."""

    def __init__(self, target: str) -> None:
        self._channel = connect(target)
        self._call = self._channel.unary_unary(INFER)

    def ask(self, model: str, value: float, *, id: str = "", version: str = "", key: str = "") -> tuple[int, float]:
        """The version that answered, and what it added; AssertionError for an answer that is not this request's."""
        message = encode_request(model, version, id, [("X", "FP32", (1, 1), struct.pack("<f", value))])
        metadata = (("aiorch-route-key", key),) if key else ()
        answer = self._call(message, metadata=metadata, timeout=TIMEOUT_S)
        found, by, told, ((name, datatype, shape, data),) = decode_response(answer)
        is_right = (found, told, name, datatype, tuple(shape)) == (model, id, "Y", "FP32", (1, 1))
        assert is_right and (not version or version == by), f"{model} {version} {id}: {answer!r}"
        return int(by), struct.unpack("<f", data)[0] - value

    def close(self) -> None:
        self._channel.close()


class Load:
    """Callers on threads, each with a server of its own; ``steady`` models must answer, ``loose`` may be gone."""

    def __init__(
        self,
        servers: Sequence[Server],
        timeline: Timeline,
        *,
        steady: Sequence[str],
        loose: Sequence[str] = (),
        callers: int = 2,
        pause_s: float = 0.004,
        seed: int = 0,
    ) -> None:
        self.tally = Tally()
        self._steady, self._loose = tuple(steady), tuple(loose)
        self._timeline, self._pause_s = timeline, pause_s
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(server, number, seed), name=f"load-{server.name}-{number}")
            for server in servers
            for number in range(callers)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> Tally:
        self._is_over.set()
        for thread in self._threads:
            thread.join(2 * TIMEOUT_S)
            assert not thread.is_alive(), f"{thread.name} hangs"
        return self.tally

    def _run(self, server: Server, number: int, seed: int) -> None:
        rng = random.Random(f"{seed} {server.name} {number}")
        asker = Asker(server.target)
        count = 0
        while not self._is_over.wait(self._pause_s):
            count += 1
            model = rng.choice(self._steady + self._loose)
            key = f"k{rng.randrange(1000)}" if rng.random() < 0.3 else ""
            began = time.monotonic()
            try:
                version, added = asker.ask(model, float(rng.randrange(100_000)), id=f"{number}-{count}", key=key)
            except grpc.RpcError as error:
                self._take_failure(server, model, error, began)
                asker.close()
                asker = Asker(server.target)
                self._is_over.wait(0.02)
            except AssertionError as error:
                self._tell(self.tally.wrong, str(error))
            else:
                with self._lock:
                    self.tally.answered += 1
                    self.tally.sums[model, version].add(added)
        asker.close()

    def _take_failure(self, server: Server, model: str, error: grpc.RpcError, began: float) -> None:
        text = f"{server.name} {model}: {error.code().name}: {error.details()}"
        if is_unconnected(error) and server.has_excuse(began, time.monotonic()):
            with self._lock:
                self.tally.unconnected += 1
        elif model in self._loose and any(each in str(error.details()) for each in GONE):
            with self._lock:
                self.tally.refused[f"{error.code().name}"] += 1
        else:
            self._tell(self.tally.failed, text)

    def _tell(self, where: list[str], text: str) -> None:
        self._timeline.note(f"!! {text}")
        with self._lock:
            where.append(text)
