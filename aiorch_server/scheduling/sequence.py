"""The scheduler of stateful models: in front of one compiled scheduler for each instance.

A sequence has a place at one instance for its whole life (`sequence_table`); what may run next is made complete with
control signals and state (`sequence_tensors`) and enters that instance's queue (`sequence_oldest`, `sequence_direct`).
Everything here is for the event loop's thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

from aiorch_server._core import Mailbox, ModelSpec, Scheduler
from aiorch_server.errors import (
    AiorchError,
    CapacityError,
    DeadlineExpired,
    InternalError,
    ModelLoadError,
    QueueTimeout,
    RequestCancelled,
    RequestError,
)
from aiorch_server.scheduling.sequence_direct import DirectFeeder
from aiorch_server.scheduling.sequence_feeder import Feeder, Seat
from aiorch_server.scheduling.sequence_job import Job, Outcome, describe_loss, job_of
from aiorch_server.scheduling.sequence_oldest import OldestFeeder
from aiorch_server.scheduling.sequence_plan import SequencePlan
from aiorch_server.scheduling.sequence_table import Member, NotStarted, SequenceTable
from aiorch_server.scheduling.sequence_tensors import StepTensors
from aiorch_server.types import Duration, InferenceRequest, InferenceResponse, ModelSignature, SchedulerCounters
from aiorch_server.validation import QueueTerms

#: Bounds of one model version: sequences that wait for a place, requests that wait in one sequence and in all.
MAX_BACKLOG = 4096
MAX_WAITING = 1024
MAX_REQUESTS = 16384
MAX_BYTES = 1 << 30


class SequenceScheduler:
    """All sequences of one loaded model version; ``schedulers`` has one for each instance."""

    def __init__(
        self,
        plan: SequencePlan,
        signature: ModelSignature,
        schedulers: Sequence[Scheduler],
        *,
        queue_size: int = 0,
        isolate_failures: bool = True,
    ) -> None:
        self.plan = plan
        self._signature = signature
        self._version = schedulers[0].spec.version
        self._steps = StepTensors(plan, signature)
        self._table = SequenceTable(
            len(schedulers),
            plan.count_slots(signature.max_batch_size),
            idle_ns=plan.idle_ns,
            max_backlog=MAX_BACKLOG,
            max_waiting=MAX_WAITING,
            max_requests=queue_size or MAX_REQUESTS,
            max_bytes=MAX_BYTES,
        )
        seats = [
            Seat(index, scheduler, self._table, self._steps, self._settle, self._pump)
            for index, scheduler in enumerate(schedulers)
        ]
        self._direct: list[DirectFeeder] = []
        if plan.is_direct:
            self._direct = [DirectFeeder(seat, isolate_failures=isolate_failures) for seat in seats]
        self._feeders: Sequence[Feeder] = self._direct or [OldestFeeder(seat) for seat in seats]
        self._mailbox: Mailbox | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = 0
        self._wakes: dict[int, int] = {}  # when an instance is to be fed again though nothing changes

    @property
    def live(self) -> int:
        """Sequences that have a place at an instance."""
        return self._table.live

    @property
    def backlog(self) -> int:
        """Sequences that wait for a place."""
        return self._table.backlog

    def has_sequence(self, correlation_id: int | str) -> bool:
        """Whether a request of that sequence would join one that is under way here."""
        return self._table.is_known(correlation_id)

    async def infer(
        self, request: InferenceRequest, terms: QueueTerms, mailbox: Mailbox, *, deadline_ns: int = 0
    ) -> InferenceResponse:
        """Runs one request in its sequence's turn; it was checked against the public signature.

        Whatever is queued was queued before the first await, so callers keep the order of their calls. Raises
        RequestError, CapacityError, or what the model raised. Cancelling it, or its deadline, ends its sequence.
        """
        place = terms.sequence
        self._check(request, terms)
        loop = asyncio.get_running_loop()
        now_ns = time.monotonic_ns()
        if deadline_ns and now_ns >= deadline_ns:
            raise DeadlineExpired("Deadline Exceeded")
        job = Job(request, place, self._steps.name_outputs([each.name for each in request.outputs]), deadline_ns, loop)
        member = Member(place.is_start, place.is_end, job.n_bytes, job)
        if self._table.is_lost:
            raise CapacityError(f"model '{self.plan.model}' has no instance any more")
        try:
            self._table.admit(place.correlation_id, member, now_ns)
        except NotStarted:
            raise RequestError(
                f"inference request for sequence {place.correlation_id} to model '{self.plan.model}' must specify the "
                "START flag on the first request of the sequence"
            ) from None
        self._mailbox = mailbox
        patience = None
        if terms.timeout_us:
            patience = loop.call_later(terms.timeout_us / 1e6, self._give_up, member)
        try:
            self._pump()
            async with asyncio.timeout_at(deadline_ns / 1e9 if deadline_ns else None):
                return await job.future
        except TimeoutError:
            raise DeadlineExpired("Deadline Exceeded") from None
        finally:
            if patience is not None:
                patience.cancel()
            if member.sequence is None or member.sequence.running is not member:  # else it is not known how far it came
                job.close_stamps()
            if not job.future.done() or job.future.cancelled():
                job.future.cancel()
                self._withdraw(member)

    def count(self, counters: SchedulerCounters) -> SchedulerCounters:
        """``counters`` of the compiled schedulers as clients count: a composed batch is as many requests as were ready.

        Times are those of the batch for each of its members; ``phases`` stay those of the batches.
        """
        if not self._direct:
            return counters
        answered, failed = (sum(getattr(each, name) for each in self._direct) for name in ("answered", "failed"))
        return dataclasses.replace(
            counters,
            rows=answered,
            success=_spread(counters.success, answered),
            fail=_spread(counters.fail, failed),
            queue=_spread(counters.queue, answered),
            compute_input=_spread(counters.compute_input, answered),
            compute_infer=_spread(counters.compute_infer, answered),
            compute_output=_spread(counters.compute_output, answered),
        )

    def close(self) -> None:
        """No request will come any more: what waits still runs, sequences that wait for requests end now."""
        if self._timer is not None:  # nothing will be idle any more; what waits for company still needs one
            self._timer.cancel()
            self._timer = None
        self._table.close(time.monotonic_ns())
        self._pump()

    def _check(self, request: InferenceRequest, terms: QueueTerms) -> None:
        model = self.plan.model
        if self._signature.max_batch_size and request.inputs[0].shape[0] > 1:
            raise RequestError(
                f"inference request to model '{model}' must specify batch-size 1 due to requirements of sequence "
                "batcher"
            )
        if not terms.sequence.correlation_id:
            raise RequestError(
                f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID"
            )
        self._steps.check_correlation(terms.sequence)

    # ------------------------------------------------------------------------------------------- what drives it on

    def _pump(self) -> None:
        """Feeds every instance where something has changed, until nothing more can be handed over."""
        now_ns = time.monotonic_ns()
        expiry_ns = self._table.expire(now_ns)
        for instance, at_ns in self._wakes.items():
            if at_ns <= now_ns:
                self._table.touch(instance)
        while due := self._table.instances_due():
            for instance in due:
                self._wakes.pop(instance, None)
                if self._mailbox is None:
                    continue
                try:
                    at_ns = self._feeders[instance].feed(self._mailbox, now_ns)
                except CapacityError as error:
                    self._lose(instance, error)
                else:
                    if at_ns:
                        self._wakes[instance] = at_ns
        self._arm(min(filter(None, (expiry_ns, *self._wakes.values())), default=0))

    def _arm(self, wake_ns: int) -> None:
        if not wake_ns or (self._timer is not None and self._timer_ns <= wake_ns):
            return
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.0, (wake_ns - time.monotonic_ns()) / 1e9)
        self._timer_ns = wake_ns
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._pump()

    def _settle(self, member: Member, outcome: Outcome) -> None:
        """A request is back: the state is taken from it, its sender answered, its sequence goes on."""
        job, sequence, now_ns = job_of(member), member.sequence, time.monotonic_ns()
        assert sequence is not None
        response: InferenceResponse | None = None
        if not isinstance(outcome, Exception):
            try:
                memory = self._steps.read_memory(outcome)
                response = job.make_response(outcome, self._signature, self._version)
                sequence.memory = memory
            except Exception as error:
                outcome = InternalError(f"the answer of model '{self.plan.model}' was lost: {type(error).__name__}")
        if isinstance(outcome, Exception) and (member.is_start or isinstance(outcome, CapacityError)):
            # without its start, or with a step that never ran, what follows would compute on a state that is wrong
            self._refuse(self._table.withdraw(member, now_ns))
        self._table.finish(member, now_ns)
        if job.future.done():
            return
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        elif response is not None:
            job.future.set_result(response)

    def _withdraw(self, member: Member) -> None:
        self._refuse(self._table.withdraw(member, time.monotonic_ns()))
        self._pump()

    def _give_up(self, member: Member) -> None:
        """The request's own timeout: it holds until the request is handed to an instance."""
        job = job_of(member)
        if member.sequence is not None and member.sequence.running is not member and not job.future.done():
            job.future.set_exception(QueueTimeout("Request timeout expired"))
            self._withdraw(member)

    def _refuse(self, members: Iterable[Member]) -> None:
        self._fail(
            members,
            lambda key: RequestCancelled(
                f"sequence {key} of model '{self.plan.model}' ended before this request could run: an earlier request "
                "of it was cancelled, expired or failed to start it; begin again with START"
            ),
        )

    def _lose(self, instance: int, error: CapacityError) -> None:
        self._fail(
            self._table.lose(instance, time.monotonic_ns()),
            lambda key: describe_loss(self.plan.model, key, error),
        )

    @staticmethod
    def _fail(members: Iterable[Member], describe: Callable[[int | str], AiorchError]) -> None:
        for member in members:
            job = job_of(member)
            if not job.future.done():
                job.future.set_exception(describe(job.place.correlation_id))


def _spread(duration: Duration, count: int) -> Duration:
    """As many as ``count``, each as long as those in ``duration`` on average."""
    return Duration(count, duration.ns * count // duration.count if duration.count else 0)


def build_sequence_schedulers(plan: SequencePlan, spec: ModelSpec, instances: int) -> list[Scheduler]:
    """One compiled scheduler for each instance; ModelLoadError where the plan contradicts the model."""
    oldest = plan.section.oldest
    try:
        return [
            Scheduler(
                spec,
                max_queue_delay_us=oldest.max_queue_delay_microseconds if oldest else 0,
                preferred_batch_sizes=oldest.preferred_batch_size if oldest else (),
            )
            for _ in range(instances)
        ]
    except ValueError as error:
        raise ModelLoadError(f"sequence_batching of model '{plan.model}': {error}") from error
