"""Strategy "direct": a sequence keeps one row of its instance's batch, absent rows are filled and marked not ready.

A batch is composed here and enters the instance's queue as one request of that many rows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from aiorch_server._core import Mailbox, encode_request, walk_elements
from aiorch_server.config.sequence import SequenceDirect
from aiorch_server.errors import CapacityError
from aiorch_server.execution.request_details import RequestDetails
from aiorch_server.scheduling.sequence_feeder import Feeder, Seat
from aiorch_server.scheduling.sequence_job import Job, describe_loss, job_of, read_outcome
from aiorch_server.scheduling.sequence_table import Member
from aiorch_server.scheduling.sequence_tensors import Row, encode_absent, encode_control
from aiorch_server.types import DataType, PhaseStamps, Tensor

#: A step as it is sent: name, datatype, shape and bytes of each input.
_Input = tuple[str, str, tuple[int, ...], bytes | memoryview]


class DirectFeeder(Feeder):
    """Feeds one instance, one composed batch at a time. A batch that fails is run again member by member."""

    def __init__(self, seat: Seat, *, isolate_failures: bool = True) -> None:
        super().__init__(seat)
        self._isolate_failures = isolate_failures
        plan = seat.steps.plan
        self._policy = plan.section.direct or SequenceDirect()
        self._slots = plan.count_slots(seat.steps.signature.max_batch_size)
        self._is_running = False
        self._alone: deque[Member] = deque()  # taken, failed together, to be run one by one
        self.answered = 0
        self.failed = 0

    def feed(self, mailbox: Mailbox, now_ns: int) -> int:
        """Composes the next batch if the instance has none and it is due; CapacityError when the queue is closed."""
        if self._is_running:
            return 0
        members = [self._alone.popleft()] if self._alone else []
        if not members:
            ready = list(self._table.ready(self._instance))
            if not ready:
                return 0
            wake_ns = self._find_due(ready)
            if wake_ns > now_ns:
                return wake_ns
            members = self._choose(ready)
            for member in members:
                self._table.take(member)
        try:
            answer, stamps = self._submit(mailbox, members)
        except Exception as error:
            is_closed = isinstance(error, CapacityError) and self._scheduler.is_closed
            if not is_closed:
                for member in members:
                    self._finish(member, error)
                return 0
            for member in (*members, *self._alone):
                key = job_of(member).place.correlation_id
                self._finish(member, describe_loss(self._steps.plan.model, key, error))
            self._alone.clear()
            raise
        self._is_running = True
        answer.add_done_callback(partial(self._on_answer, members, stamps))
        return 0

    def _find_due(self, ready: Sequence[Member]) -> int:
        """When the batch of those that are ready must start; 0: now."""
        policy = self._policy
        if len(ready) >= policy.minimum_slot_utilization * self._slots:
            return 0
        return min(member.arrived_ns for member in ready) + policy.max_queue_delay_microseconds * 1000

    def _choose(self, ready: Sequence[Member]) -> list[Member]:
        """The one that came first and all that fit into one batch with it; the others are next."""
        oldest = min(ready, key=lambda member: member.arrived_ns)
        shape = self._shape_of(oldest)
        return [member for member in ready if self._shape_of(member) == shape]

    def _shape_of(self, member: Member) -> object:
        memory = self._steps.recall(member)
        inputs = sorted((tensor.name, tensor.shape) for tensor in job_of(member).request.inputs)
        return inputs, [row[0] for row in memory.values()]

    def _submit(
        self, mailbox: Mailbox, members: Sequence[Member]
    ) -> tuple[asyncio.Future[memoryview], PhaseStamps | None]:
        """The answer to the composed batch, and what will hold its doorways if any of ``members`` is watched."""
        jobs = [job_of(member) for member in members]
        first = jobs[0].request
        outputs = dict.fromkeys(name for job in jobs for name in job.outputs)
        inputs = self._compose(members)
        contents = [each[3] for each in inputs]
        heads = [(name, datatype, shape, b"") for name, datatype, shape, _ in inputs]
        message = encode_request(first.model_name, first.model_version, "", heads, list(outputs))
        # Of several the first, or the deepest: nobody can tell for which one a model calls another.
        run = next((job.run for job in jobs if job.run is not None), None)
        callers = max((job.details.callers for job in jobs), key=len)
        stamps = None if run is None else PhaseStamps()
        details = RequestDetails(callers=callers, run=run)
        return mailbox.submit(self._scheduler, message, contents, attachment=details, stamps=stamps), stamps

    def _compose(self, members: Sequence[Member]) -> list[_Input]:
        signature, plan = self._steps.signature, self._steps.plan
        if not signature.max_batch_size:
            (member,) = members
            job = job_of(member)
            tensors = [*job.request.inputs, *self._steps.add_own(job.place, self._steps.recall(member))]
            return [(each.name, each.datatype, tuple(each.shape), each.data or b"") for each in tensors]
        rows: list[Member | None] = [None] * self._table.occupied(self._instance)
        for member in members:
            assert member.sequence is not None
            rows[member.sequence.slot] = member
        present = [(_Present(job_of(row), self._steps.recall(row)) if row is not None else None) for row in rows]
        composed: list[_Input] = []
        for tensor in job_of(members[0]).request.inputs:
            filler = _fill(DataType(tensor.datatype), tensor.shape)
            parts = [each.job.find_input(tensor.name) if each is not None else filler for each in present]
            composed.append((tensor.name, tensor.datatype, (len(rows), *tensor.shape[1:]), b"".join(parts)))
        for control in plan.controls:
            parts = [
                encode_control(control, each.job.place) if each is not None else encode_absent(control)
                for each in present
            ]
            composed.append((control.spec.name, control.spec.datatype.value, (len(rows), 1), b"".join(parts)))
        for state in plan.states:
            name, datatype = state.spec.name, state.spec.datatype
            shape = self._steps.recall(members[0])[name][0]
            filler = _fill(datatype, shape)
            parts = [each.memory[name][1] if each is not None else filler for each in present]
            composed.append((name, datatype.value, (len(rows), *shape), b"".join(parts)))
        return composed

    def _on_answer(
        self, members: Sequence[Member], stamps: PhaseStamps | None, answer: asyncio.Future[memoryview]
    ) -> None:
        self._is_running = False
        for member in members:
            run = job_of(member).run
            if stamps is not None and run is not None:
                run.stamps = dataclasses.replace(stamps, batch_members=len(members))
        outcome = read_outcome(answer)
        if not isinstance(outcome, Exception):
            by_slot = split_rows(outcome) if self._steps.signature.max_batch_size else [outcome]
            for member in members:
                assert member.sequence is not None
                self.answered += 1
                self._settle(member, by_slot[member.sequence.slot])
        elif len(members) > 1 and self._isolate_failures and not isinstance(outcome, CapacityError):
            self._alone.extend(members)
            self._table.touch(self._instance)
        else:
            for member in members:
                self._finish(member, outcome)
        self._on_change()

    def _finish(self, member: Member, error: Exception) -> None:
        self.failed += 1
        self._settle(member, error)


class _Present(NamedTuple):
    """A row that is ready, with the state that it begins with."""

    job: Job
    memory: dict[str, Row]


def split_rows(outputs: Sequence[Tensor]) -> list[list[Tensor]]:
    """The outputs of a batch row by row, each with a batch dimension of 1; views of the same memory."""
    count = outputs[0].shape[0]
    rows: list[list[Tensor]] = [[] for _ in range(count)]
    for tensor in outputs:
        data, shape, at = memoryview(tensor.data or b"").cast("B"), (1, *tensor.shape[1:]), 0
        is_text = tensor.datatype == DataType.BYTES.value
        for row in rows:
            size = walk_elements(data[at:], math.prod(shape))[1] if is_text else len(data) // count
            row.append(Tensor(tensor.name, tensor.datatype, shape, data[at : at + size]))
            at += size
    return rows


def _fill(datatype: DataType, shape: Sequence[int]) -> bytes:
    """Zeros, or empty strings; the same bytes for a row with and without its batch dimension of 1."""
    return bytes(math.prod(shape) * (datatype.itemsize or 4))
