"""What both strategies have in common: one instance, and what it takes to give it the requests of its sequences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from aiorch_server._core import Mailbox, Scheduler
from aiorch_server.scheduling.sequence_job import Settle
from aiorch_server.scheduling.sequence_table import SequenceTable
from aiorch_server.scheduling.sequence_tensors import StepTensors


class Seat(NamedTuple):
    """One instance of a model: ``settle`` takes each outcome, ``on_change`` hears that more may be ready."""

    instance: int
    scheduler: Scheduler
    table: SequenceTable
    steps: StepTensors
    settle: Settle
    on_change: Callable[[], None]


class Feeder(ABC):
    """Gives one instance what is ready."""

    def __init__(self, seat: Seat) -> None:
        self._instance, self._scheduler, self._table, self._steps, self._settle, self._on_change = seat

    @abstractmethod
    def feed(self, mailbox: Mailbox, now_ns: int) -> int:
        """Hands over what can run; gives when to look again, 0 for not before something changes.

        Raises CapacityError when the instance's queue is closed: the instance is gone.
        """
