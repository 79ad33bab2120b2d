"""Operators who deploy, upload and roll out at random, and repeat what nobody answered until somebody does."""

from __future__ import annotations

import random
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from aiorch_client import RetryPolicy
from aiorch_client.admin import AdminClient, CanaryStep, Gates, RolloutPlan, Strategy, TrafficTarget
from aiorch_client.admin import deployment_calls as deployments
from aiorch_client.admin import registry_calls as registry
from aiorch_client.admin.calls import Call
from aiorch_client.errors import ClientError
from chaos_book import Book, Content, Step
from chaos_site import Server, Timeline
from patience import PATIENCE

CALL_LIMIT_S = 20.0 * PATIENCE
RESOLVE_LIMIT_S = 60.0 * PATIENCE
PLANS: tuple[RolloutPlan, ...] = (
    RolloutPlan(Strategy.REPLACE),
    RolloutPlan(Strategy.BLUE_GREEN, bake_s=0.6),
    RolloutPlan(Strategy.CANARY, (CanaryStep(10, 0.3), CanaryStep(50, 0.3)), Gates(max_error_rate=0.5, max_wait_s=1)),
    # all versions answer differently: these go back by themselves, or wait for a person
    RolloutPlan(Strategy.CANARY, (CanaryStep(30, 1.0),), Gates(min_agreement=0.9, min_samples=10), sample_percent=50),
    RolloutPlan(
        Strategy.CANARY, (CanaryStep(30, 1.0),), Gates(min_agreement=0.9, min_samples=10), sample_percent=50,
        is_rollback_manual=True,
    ),
    RolloutPlan(Strategy.SHADOW, bake_s=0.6, sample_percent=20),
    RolloutPlan(Strategy.AB, candidate_percent=30),
)  # fmt: skip
#: What a change may end with although all is well: another rollout is under way, it is too late, somebody was faster.
REFUSALS = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED)


class Operator:
    """Changes its own models at any of the servers, one step after the other, on a thread of its own."""

    def __init__(
        self, name: str, servers: Sequence[Server], books: Sequence[Book], folder: Path, timeline: Timeline, *,
        seed: int, most_bytes: int,
    ) -> None:  # fmt: skip
        self.name, self.books = name, tuple(books)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._servers = tuple(servers)
        self._folder, self._timeline, self._most_bytes = folder, timeline, most_bytes
        self._rng = random.Random(f"{seed} {name}")
        self._clients: dict[str, AdminClient] = {}
        self._turn = threading.Condition()
        self._is_held, self._is_parked, self._is_over = True, False, False
        #: Counts up when a step begins, for whoever wants to strike just then.
        self.begun = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    # from other threads

    def hold(self) -> None:
        """Returns when no step is under way; until ``release`` none is begun."""
        with self._turn:
            self._is_held = True
            held = self._turn.wait_for(lambda: self._is_parked or self._is_over, 2 * CALL_LIMIT_S)
            assert held, f"{self.name} hangs in a call"

    def release(self) -> None:
        with self._turn:
            self._is_held = False
            self._turn.notify_all()

    def close(self) -> None:
        with self._turn:
            self._is_over = True
            self._turn.notify_all()
        self._thread.join(3 * CALL_LIMIT_S)
        for client in self._clients.values():
            client.close()

    def resolve(self) -> None:
        """Repeats what is pending until it is known what became of it; for who holds the operator."""
        until = time.monotonic() + RESOLVE_LIMIT_S
        for book in self.books:
            while book.pending is not None:
                assert time.monotonic() < until, f"{self.name}: no answer to {book.pending}"
                self._try(book, book.pending)
                time.sleep(0.05)

    def do(self, book: Book, step: Step) -> bool:
        """One step until it is known what became of it; whether it was done. For who holds the operator."""
        before = len(book.done)
        book.pending = step
        self.resolve()
        return len(book.done) > before

    # the thread

    def _run(self) -> None:
        while True:
            with self._turn:
                self._is_parked = self._is_held
                self._turn.notify_all()
                self._turn.wait_for(lambda: not self._is_held or self._is_over)
                self._is_parked = False
                if self._is_over:
                    return
            try:
                book = self._rng.choice(self.books)
                if book.pending is None:
                    book.pending = self.choose(book)
                if book.pending is not None:
                    self.begun.release()
                    self._try(book, book.pending)
            except Exception as error:
                self._fail(f"{self.name}: {type(error).__name__}: {error}")
            time.sleep(self._rng.choice((0.0, 0.0, 0.02, 0.1)))

    def _try(self, book: Book, step: Step) -> None:
        server = self._rng.choice(self._servers)
        step.attempts += 1
        if step.attempts == 1:
            self._timeline.note(f"{self.name}: {book.model} at {server.name}: {step}")
        else:
            self.counts["repeats"] += 1
        began = time.monotonic()
        try:
            answer = step.make(self._client(server))
        except ClientError as error:
            told = f"{self.name}: {book.model}: {step} at {server.name}: {error.code.name}: {error.details}"
            if error.code is grpc.StatusCode.UNAVAILABLE:
                if "failed to connect" not in error.details:
                    self.counts["unacknowledged"] += 1
                    self._timeline.note(told)
                if not server.has_excuse(began, time.monotonic()):
                    self.counts["unavailable"] += 1
                    self._timeline.note(f"?! {told}")
                return
            book.pending = None
            self.counts["refused"] += 1
            self._timeline.note(told)
            is_fine = error.code in REFUSALS or (error.code is grpc.StatusCode.NOT_FOUND and not book.is_steady)
            if not is_fine:
                self._fail(told)
            return
        book.pending = None
        book.done.append(step)
        self.counts["acknowledged"] += 1
        if step.attempts > 1:
            self.counts["acknowledged on repeat"] += 1
        self._timeline.note(f"{self.name}: {book.model}: done: {step}")
        step.take(answer)

    def _fail(self, text: str) -> None:
        self._timeline.note(f"!! {text}")
        self.failures.append(text)

    def _client(self, server: Server) -> AdminClient:
        if server.name not in self._clients:
            self._clients[server.name] = AdminClient(
                server.target, timeout_s=CALL_LIMIT_S, retry=RetryPolicy(max_attempts=1)
            )
        return self._clients[server.name]

    # what is asked for

    def choose(self, book: Book) -> Step | None:
        """The next step; None where the die asked for what makes no sense now."""
        if not book.versions or (len(book.usable()) < 2):
            return self.push(book)
        if not book.is_deployed:
            return self.deploy(book)
        kinds: dict[Callable[[Book], Step | None], float] = {
            self.push: 4, self.deploy: 7, self.set_alias: 3, self.update: 2, self.delete_version: 2, self.scale: 1,
            self.set_traffic: 1, self.promote: 2.5, self.rollback: 1.5, self.pause: 1, self.resume: 1, self.abort: 2,
            self.undeploy: 0 if book.is_steady else 1,
        }  # fmt: skip
        return self._rng.choices(list(kinds), list(kinds.values()))[0](book)

    def register(self, book: Book) -> Step:
        call = registry.register_model(book.model, "", {})
        return self._step("ModelRegistry/RegisterModel", call, {"name": book.model}, lambda _: None)

    def push(self, book: Book) -> Step:
        refuses = not book.is_steady and self._rng.random() < 0.2
        content = Content.make(self._rng, most_bytes=self._most_bytes, refuses=refuses)
        folder = content.write(self._folder / f"{self.name}-{content.number}")
        upload_id = str(uuid.UUID(int=self._rng.getrandbits(128)))
        aliases = ("newest",) if self._rng.random() < 0.3 else ()

        def make(client: AdminClient) -> Any:
            return client.push(
                book.model, folder, upload_id=upload_id, aliases=aliases, is_origin_looked_up=False,
                timeout_s=CALL_LIMIT_S,
            )  # fmt: skip

        def take(answer: Any) -> None:
            book.take_version(answer, content)
            book.aliases.update(dict.fromkeys(aliases, answer.version))
            shutil.rmtree(folder)

        return Step("/aiorch.admin.v1.ModelRegistry/UploadVersion", {"upload_id": upload_id}, make, take)

    def deploy(self, book: Book) -> Step:
        version = self._rng.choice(book.usable())
        call = deployments.deploy(book.model, version, "", self._rng.choice(PLANS), 0, False, 0)
        return self._step("Deployments/Deploy", call, {"version": version}, book.take_deployment)

    def set_alias(self, book: Book) -> Step:
        alias = self._rng.choice(("prod", "old", "newest"))
        version = self._rng.choice((0, *book.versions))

        def take(_: Any) -> None:
            book.aliases.pop(alias, None)
            book.aliases.update({alias: version} if version else {})

        told = {"alias": alias, **({"version": version} if version else {})}
        call = registry.set_alias(book.model, alias, version, 0)
        return self._step("ModelRegistry/SetAlias", call, told, take)

    def update(self, book: Book) -> Step:
        text = f"text {self._rng.random()}"

        def take(found: Any) -> None:
            assert found.description == text
            book.description = text

        call = registry.update_model(book.model, text, None, "")
        return self._step("ModelRegistry/UpdateModel", call, {}, take)

    def delete_version(self, book: Book) -> Step | None:
        idle = sorted(set(book.versions) - set(book.aliases.values()))[:-3]
        if not idle:
            return None
        version = self._rng.choice(idle)

        def take(_: Any) -> None:
            book.deleted[version] = book.versions.pop(version)

        call = registry.delete_version(book.model, version)
        return self._step("ModelRegistry/DeleteVersion", call, {"version": version}, take)

    def scale(self, book: Book) -> Step:
        instances = self._rng.choice((1, 2))
        call = deployments.scale(book.model, instances, 0)
        return self._step("Deployments/Scale", call, {"instances": instances}, book.take_deployment)

    def set_traffic(self, book: Book) -> Step:
        good = [version for version in book.usable() if not book.versions[version].refuses]
        chosen = self._rng.sample(good, min(2, len(good)))
        if not chosen:
            return self.push(book)
        share = float(self._rng.randrange(10, 90)) if len(chosen) == 2 else 100.0
        shares = dict(zip(chosen, (share, 100.0 - share), strict=False))

        def take(found: Any) -> None:
            book.take_deployment(found)
            book.take_traffic(found, shares)

        targets = [TrafficTarget(version, percent) for version, percent in shares.items()]
        return self._step("Deployments/SetTraffic", deployments.set_traffic(book.model, targets, 0), {}, take)

    def promote(self, book: Book) -> Step:
        return self._step("Deployments/Promote", deployments.promote(book.model), {}, book.take_rollout)

    def rollback(self, book: Book) -> Step:
        return self._direct("Rollback", deployments.rollback, book)

    def pause(self, book: Book) -> Step:
        return self._direct("Pause", deployments.pause, book)

    def resume(self, book: Book) -> Step:
        return self._step("Deployments/Resume", deployments.resume(book.model), {}, book.take_rollout)

    def abort(self, book: Book) -> Step:
        return self._direct("Abort", deployments.abort, book)

    def undeploy(self, book: Book) -> Step:
        call = deployments.undeploy(book.model)
        return self._step("Deployments/Undeploy", call, {}, lambda _: book.take_undeployed())

    def _direct(self, name: str, build: Callable[[str, str], Call[Any]], book: Book) -> Step:
        reason = f"r{self._rng.getrandbits(40)}"
        return self._step(f"Deployments/{name}", build(book.model, reason), {"reason": reason}, book.take_rollout)

    def _step(self, method: str, call: Call[Any], told: dict[str, Any], take: Callable[[Any], None]) -> Step:
        call.request.idempotency_key = str(uuid.UUID(int=self._rng.getrandbits(128)))
        return Step(f"/aiorch.admin.v1.{method}", told, lambda client: client._call(call, CALL_LIMIT_S), take)
