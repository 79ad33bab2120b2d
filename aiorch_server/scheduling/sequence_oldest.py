"""Strategy "oldest": the next request of each sequence enters the instance's queue, which batches dynamically."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial

from aiorch_server._core import Mailbox
from aiorch_server.errors import CapacityError
from aiorch_server.execution.submission import submit
from aiorch_server.scheduling.sequence_feeder import Feeder, Seat
from aiorch_server.scheduling.sequence_job import describe_loss, job_of, read_outcome
from aiorch_server.scheduling.sequence_table import Member


class OldestFeeder(Feeder):
    """Feeds one instance. A request that was handed over is not taken back: its outcome is needed for the state."""

    def __init__(self, seat: Seat) -> None:
        super().__init__(seat)
        oldest = seat.steps.plan.section.oldest
        self._keeps_order = oldest is not None and oldest.preserve_ordering
        self._order: deque[tuple[Member, asyncio.Future[memoryview]]] = deque()

    def feed(self, mailbox: Mailbox, now_ns: int) -> int:
        """Hands over all that is ready; CapacityError when the queue is closed."""
        for member in self._table.ready(self._instance):
            self._table.take(member)
            try:
                answer = self._submit(mailbox, member)
            except Exception as error:
                if isinstance(error, CapacityError) and self._scheduler.is_closed:
                    job = job_of(member)
                    self._settle(member, describe_loss(self._steps.plan.model, job.place.correlation_id, error))
                    raise
                self._settle(member, error)
                continue
            if self._keeps_order:
                self._order.append((member, answer))
            answer.add_done_callback(partial(self._on_answer, member))
        return 0

    def _submit(self, mailbox: Mailbox, member: Member) -> asyncio.Future[memoryview]:
        job = job_of(member)
        tensors = [*job.request.inputs, *self._steps.add_own(job.place, self._steps.recall(member))]
        return submit(
            mailbox,
            self._scheduler,
            job.request,
            tensors,
            job.outputs,
            job.details,
            deadline_ns=job.deadline_ns,
            stamps=None if job.run is None else job.run.stamps,
        )

    def _on_answer(self, member: Member, answer: asyncio.Future[memoryview]) -> None:
        if not self._keeps_order:
            self._settle(member, read_outcome(answer))
        while self._order and self._order[0][1].done():
            first, its_answer = self._order.popleft()
            self._settle(first, read_outcome(its_answer))
        self._on_change()
