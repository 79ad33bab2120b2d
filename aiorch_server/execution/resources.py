"""Resources that instances of all models share: an instance holds what its group asks for while it runs a batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from aiorch_server.backend import Backend, LoadContext, ModelInstance, ModelRequest, RequestInstance
from aiorch_server.config.placement import RateLimiter
from aiorch_server.errors import ModelLoadError
from aiorch_server.execution.callers import Holding, this_thread
from aiorch_server.types import ModelSignature, NumpyArray

#: A resource's name, and the device that it belongs to; "" for one of the whole server.
Resource = tuple[str, str]


@dataclass(frozen=True, slots=True)
class ResourceLimit:
    """How much there is of a resource: on one device, or anywhere with None."""

    name: str
    count: int
    device: str | None = None

    @classmethod
    def parse(cls, text: str) -> ResourceLimit:
        """``NAME:COUNT``, or ``NAME:COUNT:GPU`` for one GPU; the settings have checked it."""
        name, count, *gpu = text.split(":")
        return cls(name, int(count), f"cuda:{int(gpu[0])}" if gpu else None)


@dataclass(eq=False, slots=True)
class Claim:
    """What one instance of ``model`` takes at a time; ``turn`` grows with each run by its priority: lowest first."""

    pool: ResourcePool
    model: str
    needs: Mapping[Resource, int]
    priority: int
    turn: int = 0
    granted: threading.Event = field(default_factory=threading.Event)

    def explain_conflict(self, model: str, held: Sequence[Holding]) -> str:
        """See Holding."""
        return self.pool.explain_conflict(model, [each for each in held if isinstance(each, Claim)])


class ResourcePool:
    """Counts what is taken of each resource over all models; thread-safe.

    There is as much of a resource as ``limits`` say, or else as the most demanding loaded instance needs. An instance
    gets all that it needs at once or waits. Of those that want the same, priority 2 gets half as many turns as priority
    1, in order of arrival among equals; nobody is overtaken for ever. An instance that calls other models goes on
    holding: ``explain_conflict`` finds the calls that would wait for their own caller.
    """

    def __init__(self, limits: Sequence[ResourceLimit] = ()) -> None:
        self._limits = tuple(limits)
        self._lock = threading.Lock()
        self._taken: dict[Resource, int] = {}
        self._claims: list[Claim] = []
        self._waiting: list[Claim] = []
        self._turn = 0

    def add(self, limiter: RateLimiter, device: str, model: str = "") -> Claim:
        """A claim for one instance of ``model`` on ``device``; ModelLoadError where it could never be granted."""
        needs: dict[Resource, int] = {}
        for resource in limiter.resources:
            key = (resource.name, "" if resource.is_global else device)
            needs[key] = max(needs.get(key, 0), resource.count)
        for key, count in needs.items():
            limit = self._read_limit(key)
            if limit is not None and count > limit:
                where = f" on {key[1]}" if key[1] else ""
                raise ModelLoadError(
                    f"instance_group.rate_limiter: resource '{key[0]}': found count {count}, the server has "
                    f"{limit}{where}; see --rate-limit-resource"
                )
        claim = Claim(self, model, needs, max(limiter.priority, 1))
        with self._lock:
            self._claims.append(claim)
        return claim

    def remove(self, claim: Claim) -> None:
        """The instance is gone; it holds nothing."""
        with self._lock:
            self._claims.remove(claim)

    @contextmanager
    def hold(self, claim: Claim) -> Iterator[None]:
        """Blocks until the claim is granted, and gives it back; one thread at a time per claim."""
        with self._lock:
            claim.granted.clear()
            claim.turn = max(claim.turn, self._turn) + claim.priority
            self._waiting.append(claim)
            self._grant()
        try:
            claim.granted.wait()
            this_thread.holding = claim
            yield
        finally:
            this_thread.holding = None
            with self._lock:
                if claim.granted.is_set():
                    for key, count in claim.needs.items():
                        self._taken[key] -= count
                else:
                    self._waiting.remove(claim)
                self._grant()

    def explain_conflict(self, model: str, held: Sequence[Claim]) -> str:
        """Why some instance of ``model`` could not run before ``held`` is given back; "" if each could."""
        with self._lock:
            for claim in self._claims:
                if claim.model != model:
                    continue
                for key, count in claim.needs.items():
                    taken = sum(each.needs.get(key, 0) for each in held)
                    limit = self._measure(key)
                    if taken and taken + count > limit:
                        where = f" on {key[1]}" if key[1] else ""
                        return (
                            f"it needs {count} of resource '{key[0]}'{where}, of which the server has {limit} and its "
                            f"callers hold {taken} until they are answered; see --rate-limit-resource"
                        )
        return ""

    def read_taken(self) -> Mapping[Resource, int]:
        """What is taken now, of each resource that was ever taken."""
        with self._lock:
            return dict(self._taken)

    def _grant(self) -> None:
        wanted: set[Resource] = set()
        for claim in sorted(self._waiting, key=lambda each: each.turn):
            fits = all(self._taken.get(key, 0) + count <= self._measure(key) for key, count in claim.needs.items())
            if fits and wanted.isdisjoint(claim.needs):
                self._waiting.remove(claim)
                for key, count in claim.needs.items():
                    self._taken[key] = self._taken.get(key, 0) + count
                self._turn = max(self._turn, claim.turn - claim.priority)
                claim.granted.set()
            else:
                wanted.update(claim.needs)  # what comes later must not take it away

    def _measure(self, key: Resource) -> int:
        limit = self._read_limit(key)
        return limit if limit is not None else max((claim.needs.get(key, 0) for claim in self._claims), default=0)

    def _read_limit(self, key: Resource) -> int | None:
        name, device = key
        fitting = {each.device: each.count for each in self._limits if each.name == name}
        return fitting.get(device or None, fitting.get(None))


class LimitedBackend(Backend):
    """A backend whose instances hold their claims while they run.

    ``limiters`` has one per instance, None for none; instances that come later take them from the first on.
    """

    def __init__(self, backend: Backend, pool: ResourcePool, limiters: Sequence[RateLimiter | None]) -> None:
        self.name = backend.name  # type: ignore[misc]
        self._backend = backend
        self._pool = pool
        self._limiters = tuple(limiters)

    def inspect(self, context: LoadContext) -> ModelSignature:
        """That of the real backend."""
        return self._backend.inspect(context)

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        """An instance of the real backend, behind one that waits for its resources."""
        limiter = self._limiters[context.instance_index % len(self._limiters)]
        if limiter is None or not limiter.resources:
            return self._backend.load(context, signature)
        claim = self._pool.add(limiter, context.device, context.model_name)
        try:
            instance = self._backend.load(context, signature)
        except BaseException:
            self._pool.remove(claim)
            raise
        if isinstance(instance, RequestInstance):
            return _LimitedRequestInstance(instance, self._pool, claim)
        return _LimitedInstance(instance, self._pool, claim)


class _LimitedInstance(ModelInstance):
    """Not compiled: it waits here."""

    def __init__(self, instance: ModelInstance, pool: ResourcePool, claim: Claim) -> None:
        self._instance = instance
        self._pool = pool
        self._claim = claim

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        with self._pool.hold(self._claim):
            return self._instance.execute(inputs)

    def close(self) -> None:
        try:
            self._instance.close()
        finally:
            self._pool.remove(self._claim)


class _LimitedRequestInstance(RequestInstance):
    """Holds its claim while the model has the batch; what it answers later, it answers without."""

    def __init__(self, instance: RequestInstance, pool: ResourcePool, claim: Claim) -> None:
        self._instance = instance
        self._pool = pool
        self._claim = claim

    def execute_requests(self, requests: Sequence[ModelRequest]) -> None:
        with self._pool.hold(self._claim):
            self._instance.execute_requests(requests)

    def close(self) -> None:
        try:
            self._instance.close()
        finally:
            self._pool.remove(self._claim)
