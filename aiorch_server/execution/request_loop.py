"""The loop of an instance that takes requests instead of batches: out of the batch, into the model, until all ended."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Final

from aiorch_server._core import Batch, Member, Scheduler, count_run, detach
from aiorch_server.backend import RequestInstance
from aiorch_server.execution.callers import Callers
from aiorch_server.execution.held_request import HeldRequest, RequestOwner
from aiorch_server.tracing import Run, speak_of

#: Requests that one instance holds unanswered; with so many it takes no further batch.
MAX_OPEN: Final = 4096
_LONG_S: Final = 3600.0


class RequestLoop:
    """Serves one instance on that instance's thread; ``fail_open`` may be called by any thread.

    ``answer`` turns an error into code and text for a client, ``log`` writes a failure down.
    """

    def __init__(
        self,
        instance: RequestInstance,
        scheduler: Scheduler,
        owner: RequestOwner,
        *,
        isolate_failures: bool,
        answer: Callable[[BaseException], tuple[int, str]],
        log: Callable[[BaseException], None],
    ) -> None:
        self._instance = instance
        self._scheduler = scheduler
        self._owner = owner
        self._isolate_failures = isolate_failures
        self._answer = answer
        self._log = log
        self._changed = threading.Condition()
        self._n_open = 0
        self._failure: tuple[int, str] | None = None
        self._current: Sequence[HeldRequest] = ()
        # Weak: a request that the model lets go of has to notice.
        self._open: weakref.WeakSet[HeldRequest] = weakref.WeakSet()

    def serve(self) -> None:
        """Returns once the scheduler is closed and empty and all requests have ended.

        An exception that is no ``Exception`` (SystemExit in a model's code) ends all requests, and is raised.
        """
        batch = Batch(self._scheduler)
        try:
            while self._await_room() and self._scheduler.take(batch):
                self._run(batch)
            with self._changed:
                self._changed.wait_for(lambda: self._n_open == 0)
        except BaseException as error:
            # The error's traceback keeps the batch, and would leave what has not been taken out of it waiting.
            batch.select(None)
            batch.fail(*self._answer(error))
            batch.leave()
            self.fail_open(*self._answer(error))
            raise

    def read_callers(self) -> Callers:
        """Who called what runs now; on the instance's thread."""
        return max((request.callers for request in self._current), key=len, default=())

    def read_run(self) -> Run | None:
        """A watched request among what runs now; on the instance's thread."""
        return next((request.run for request in self._current if request.run is not None), None)

    def is_unwanted(self) -> bool:
        """Whether nobody waits for what runs now; on the instance's thread."""
        return bool(self._current) and all(request.is_cancelled() for request in self._current)

    def fail_open(self, code: int, text: str) -> None:
        """Fails every request that the model still holds or gets; what it sends from then on is refused."""
        with self._changed:
            self._failure = code, text
            held = list(self._open)
        for request in held:
            request.abandon(code, text)

    def _await_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._n_open < MAX_OPEN)
        return True

    def _run(self, batch: Batch) -> None:
        rows, started_ns = batch.rows, time.monotonic_ns()
        requests = self._hold(detach(batch))
        gathered_ns = time.monotonic_ns()
        if not requests:
            return
        try:
            self._execute(requests)
        finally:
            count_run(batch, rows, gathered_ns - started_ns, time.monotonic_ns() - gathered_ns)

    def _hold(self, members: list[Member]) -> list[HeldRequest]:
        requests = []
        for member in members:
            try:
                request = HeldRequest(member, self._owner, self._on_end)
            except Exception as error:  # no memory for its inputs
                member.fail(*self._answer(error))
                continue
            with self._changed:
                self._n_open += 1
                self._open.add(request)
                failure = self._failure
            if failure is not None:  # the batch was taken before, so nobody else will
                request.abandon(*failure)
                continue
            requests.append(request)
        return requests

    def _execute(self, requests: Sequence[HeldRequest]) -> None:
        try:
            self._hand_over(requests)
        except Exception as error:
            run = requests[0].run if len(requests) == 1 else None
            with speak_of(None if run is None else run.trace):
                self._log(error)
            is_untouched = not any(request.is_ended for request in requests)
            if self._isolate_failures and is_untouched and len(requests) > 1 and not self._owner.signature.is_decoupled:
                for request in requests:
                    self._execute_alone(request)
                return
            for request in requests:
                request.abandon(*self._answer(error))

    def _hand_over(self, requests: Sequence[HeldRequest]) -> None:
        self._current = list(requests)
        try:
            self._instance.execute_requests(requests)
        finally:
            self._current = ()

    def _execute_alone(self, request: HeldRequest) -> None:
        try:
            self._hand_over([request])
        except Exception as error:
            request.abandon(*self._answer(error))

    def _on_end(self, request: HeldRequest) -> None:
        with self._changed:
            self._n_open -= 1
            self._open.discard(request)
            self._changed.notify_all()
