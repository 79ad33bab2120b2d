"""When requests for a model come and how many rows they have, told while they come; never what is in them."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Final, Protocol

from aiorch_proto.admin.v1 import tuning_pb2 as pb

from aiorch_server.errors import ModelNotReady, PreconditionFailed, ServerStopping
from aiorch_server.frontends.admin.fields import InvalidField, check_range

LONGEST_S: Final = 3600.0
#: Between two messages.
_LOOK_S: Final = 0.5
#: Requests of one message: far below the 4 MiB that clients receive.
_MOST: Final = 65_536


class RecordedQueue(Protocol):
    """What is asked of a version's queue; see Scheduler."""

    @property
    def is_closed(self) -> bool:
        """Whether nothing comes any more."""
        ...

    def start_recording(self) -> None:
        """ValueError where it is being recorded."""
        ...

    def take_recording(self) -> tuple[bytes, bytes, int]:
        """Times, rows, and how many were lost."""
        ...

    def stop_recording(self) -> None:
        """Notes no more."""
        ...


#: The version of a model that is meant (0: any), and its queue; raises where there is none.
FindQueue = Callable[[str, int], tuple[int, RecordedQueue]]


def refuse_all(model: str, version: int) -> tuple[int, RecordedQueue]:
    """Of a server that has no queues."""
    raise PreconditionFailed(f"model '{model}' has no queue on this server")


class TrafficRecorder:
    """Records traffic for those who ask; on one event loop."""

    def __init__(self, find_queue: FindQueue) -> None:
        self._find_queue = find_queue
        self._stopping = asyncio.Event()

    def announce_stop(self) -> None:
        """Ends all recordings with ServerStopping."""
        self._stopping.set()

    async def record(self, request: Any) -> AsyncGenerator[pb.RecordedTraffic, None]:
        """Messages as tuning.proto says; who stops to listen ends it.

        Raises InvalidField, what finding the model raises, PreconditionFailed where it is being recorded,
        ModelNotReady when the version is taken away meanwhile, ServerStopping.
        """
        seconds = _read_duration(request)
        version, queue = self._find_queue(request.model, int(check_range(request.version, "version", 0, 2**63 - 1)))
        try:
            queue.start_recording()
        except ValueError as error:
            raise PreconditionFailed(f"model '{request.model}' version {version}: {error}") from None
        try:
            loop = asyncio.get_running_loop()
            until = loop.time() + seconds
            yield pb.RecordedTraffic(version=version)
            while (left := until - loop.time()) > 0:
                await self._rest(min(left, _LOOK_S))
                is_over = queue.is_closed
                for message in _encode(version, *queue.take_recording()):
                    yield message
                if self._stopping.is_set():
                    raise ServerStopping("the server is stopping: the recording ends here")
                if is_over:
                    raise ModelNotReady(f"model '{request.model}' version {version} was taken away meanwhile")
        finally:
            queue.stop_recording()

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass


def _read_duration(request: Any) -> float:
    duration = request.duration
    seconds: float = duration.seconds + duration.nanos / 1e9
    if not 0 < seconds <= LONGEST_S:
        raise InvalidField("duration", f"is {seconds:g} s; expected more than 0 and at most {LONGEST_S:g}")
    return seconds


def _encode(version: int, times: bytes, rows: bytes, lost: int) -> Iterator[pb.RecordedTraffic]:
    times_ns, counts = array("q", times), array("i", rows)
    for start in range(0, max(1, len(times_ns)), _MOST):
        part = slice(start, start + _MOST)
        yield pb.RecordedTraffic(version=version, times_ns=times_ns[part], rows=counts[part], lost=lost)
        lost = 0
