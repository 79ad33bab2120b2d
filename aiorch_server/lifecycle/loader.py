"""From an opened repository model to a warm Servable: configuration, artefact, signature, scheduler, instances."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from aiorch_server._core import ModelSpec, Scheduler
from aiorch_server.backend import Backend, DeclaredSignature, DeclareMetric, LoadContext
from aiorch_server.config.model import ModelConfig
from aiorch_server.config.parameters import FLAGS, find_idle_parameters, find_unknown_parameters, read_flag
from aiorch_server.config.problems import format_problems
from aiorch_server.errors import AiorchError, ModelLoadError
from aiorch_server.execution.failures import describe_error
from aiorch_server.execution.group import SchedulerGroup
from aiorch_server.execution.model_calls import InstanceCalls, ModelCalls
from aiorch_server.execution.placement import Place, count_cpus, place_instances
from aiorch_server.execution.ragged import RaggedBackend
from aiorch_server.execution.ragged_tensors import RaggedTensors
from aiorch_server.execution.reshape import ReshapedBackend, Reshaping
from aiorch_server.execution.resources import LimitedBackend, ResourcePool
from aiorch_server.execution.thread_executor import InstanceGroup
from aiorch_server.execution.warmup import make_samples
from aiorch_server.lifecycle.backends import BackendRegistry
from aiorch_server.lifecycle.memory import Charge, measure_files
from aiorch_server.lifecycle.servable import Servable
from aiorch_server.lifecycle.threads import run_blocking
from aiorch_server.pauses import pause
from aiorch_server.repository import BackendNames, RepositoryModel
from aiorch_server.scheduling import build_scheduler, read_plan
from aiorch_server.types import ModelSignature

logger = logging.getLogger(__name__)

#: How long a version may take to load and warm up.
STARTUP_TIMEOUT_S = 300.0
#: How many versions load at the same time.
CONCURRENT_LOADS = 4


@dataclass(frozen=True, slots=True)
class Weight:
    """What a version is thought to take before it is loaded: its files' bytes, for each instance on its device."""

    files_bytes: int
    charge: Charge


class Source:
    """An opened repository model, shared by the versions loaded from it; closed with the last of them. Thread-safe."""

    def __init__(self, model: RepositoryModel) -> None:
        self.model = model
        self._lock = threading.Lock()
        self._references = 1

    def retain(self) -> None:
        """One more user."""
        with self._lock:
            self._references += 1

    def select(self, version: int) -> Source:
        """The source for one version, with the caller as a user; may block on files. Raises as its model does."""
        model = self.model.select(version)
        if model is not self.model:
            return Source(model)
        self.retain()
        return self

    def release(self) -> None:
        """One user less; the last one closes the model, which may block on files."""
        with self._lock:
            self._references -= 1
            is_last = self._references == 0
        if is_last:
            try:
                self.model.close()
            except Exception:
                logger.exception("closing the repository's model '%s' failed", self.model.name)


class Loader:
    """Loads model versions; blocking work runs in threads, at most ``concurrency`` loads at a time."""

    def __init__(
        self,
        backends: BackendRegistry,
        *,
        default_max_batch_size: int = 32,
        default_instances: int = 1,
        allow_code: bool = False,
        default_queue_size: int = 0,
        declare_metric: DeclareMetric | None = None,
        startup_timeout_s: float = STARTUP_TIMEOUT_S,
        concurrency: int = CONCURRENT_LOADS,
        calls: ModelCalls | None = None,
        resources: ResourcePool | None = None,
        identifies: bool = False,
        before_serving: Callable[[], object] | None = None,
    ) -> None:
        """``identifies``: each servable's ``identity`` is of its files' contents, which are read once more for it.

        ``before_serving`` is called in the thread of each instance when that is loaded.
        """
        self._backends = backends
        self._default_max_batch_size = default_max_batch_size
        self._default_instances = default_instances
        self._allow_code = allow_code
        self.default_queue_size = default_queue_size
        self._declare_metric = declare_metric
        self.startup_timeout_s = startup_timeout_s
        self._calls = calls or ModelCalls()
        self._resources = resources or ResourcePool()
        self._identifies = identifies
        self._before_serving = before_serving
        self._slots = asyncio.Semaphore(concurrency)
        self._fetches = asyncio.Semaphore(concurrency)

    async def select(self, source: Source, version: int) -> Source:
        """``Source.select`` in a thread; what it gives is released should the caller be gone by then."""
        async with self._fetches:
            return await run_blocking(
                f"fetch {source.model.name}:{version}", lambda: source.select(version), discard=Source.release
            )

    def weigh(self, source: Source, version: int) -> Weight:
        """What a version is thought to take; blocks on files. Raises ModelLoadError."""
        model = source.model
        size = measure_files(model.locate(version, self._names()).path)
        charge: dict[str, int] = {}
        for place in self._place(model):
            charge[place.device] = charge.get(place.device, 0) + size
        return Weight(size, charge)

    def _names(self) -> BackendNames:
        return BackendNames(artefacts=self._backends.artefact_names(), platforms=self._backends.platforms())

    def _place(self, model: RepositoryModel) -> tuple[Place, ...]:
        return place_instances(
            model.config.instance_group,
            cpus=count_cpus(),
            default_count=self._default_instances,
            threads=_read_threads(model.config.to_strings().get("cpu_threads")),
        )

    async def load(self, source: Source, version: int, fingerprint: str) -> Servable:
        """A warm servable whose instances pull already; the caller owns it.

        Raises ModelLoadError. When cancelled or out of time, what still loads is closed as soon as it is loaded.
        """
        label = f"{source.model.name}:{version}"
        async with self._slots:
            source.retain()  # for the thread, which may outlive this call

            def load() -> Servable:
                try:
                    return self._load(source, version, fingerprint)
                except AiorchError:
                    raise
                except BaseException as error:  # a model's code that calls exit() must not take the event loop along
                    logger.exception("loading '%s' failed", label)
                    raise ModelLoadError(f"'{label}' does not load: {describe_error(error)}") from error
                finally:
                    source.release()

            try:
                return await run_blocking(
                    f"load {label}",
                    load,
                    # The instances have the same limit; this one is for what comes before them.
                    timeout_s=self.startup_timeout_s + 1.0,
                    discard=lambda servable: servable.abandon(f"the load of '{label}' was given up"),
                )
            except TimeoutError:
                raise ModelLoadError(f"'{label}' did not load within {self.startup_timeout_s:g} s") from None

    def _load(self, source: Source, version: int, fingerprint: str) -> Servable:
        model, started = source.model, time.monotonic()
        artefact = model.locate(version, self._names())
        backend = self._backends.get(artefact.backend)
        if backend.runs_code and not artefact.is_stored and not self._allow_code:
            raise ModelLoadError(
                f"'{model.name}' version {version}: {model.origin} brings or chooses '{artefact.path.name}' for "
                f"backend '{backend.name}', whose artefacts can run code, which is not allowed here (allow_code is "
                "off). Put the model into the repository, or start the server with --allow-code to trust whoever can "
                f"{model.senders}"
            )
        parameters = model.config.to_strings()
        _check_parameters(model.name, parameters, backend)
        places = self._place(model)
        pause()
        plan = read_plan(model.config, model.directory)
        declared = model.declared if plan is None else plan.declare(model.declared)
        reshaping = Reshaping.of(model.config)
        if reshaping is not None:
            declared = reshaping.declare(declared)
        ragged = RaggedTensors.of(model.config)
        if ragged is not None:
            declared = ragged.declare(declared)
        contexts = [
            LoadContext(
                model_name=model.name,
                model_version=version,
                model_directory=model.directory,
                artefact=artefact.path,
                declared=declared,
                instance_index=index,
                threads=place.threads,
                device=place.device,
                parameters=parameters,
                allow_code=self._allow_code,
                is_requested=model.is_requested,
                default_max_batch_size=self._default_max_batch_size,
                config=model.config.to_dict(),
                call_model=InstanceCalls(self._calls, model.name),
                declare_metric=self._declare_metric,
            )
            for index, place in enumerate(places)
        ]
        pause()
        signature = _add_labels(backend.inspect(contexts[0]), model.declared)
        loading = backend
        if any(place.limiter for place in places):
            loading = LimitedBackend(backend, self._resources, [place.limiter for place in places])
        if reshaping is not None:
            loading = ReshapedBackend(loading, reshaping, signature)
            signature = reshaping.show(signature)
        if ragged is not None:
            loading = RaggedBackend(loading, ragged, signature)
            signature = ragged.show(signature)
        public = signature if plan is None else plan.separate(signature, model.declared)
        policy = model.config.model_transaction_policy
        if policy is not None and policy.decoupled:
            signature = dataclasses.replace(signature, is_decoupled=True)
            public = dataclasses.replace(public, is_decoupled=True)
        if signature.is_decoupled and plan is not None:
            raise ModelLoadError(
                f"'{model.name}' version {version}: model_transaction_policy.decoupled and sequence_batching do not go "
                "together in this version; remove one of them"
            )
        pause()
        config = _complete_config(model.config, public, backend, places)
        contexts = [dataclasses.replace(context, config=config.to_dict()) for context in contexts]
        try:
            spec = ModelSpec(model.name, version, signature)
        except (ValueError, OverflowError) as error:
            raise ModelLoadError(f"'{model.name}' version {version} cannot be served: {error}") from error
        pause()
        isolates = read_flag(parameters, "isolate_failures")
        scheduler: Scheduler | SchedulerGroup
        sequencer = None
        if plan is None:
            scheduler = build_scheduler(config, spec, default_queue_size=self.default_queue_size)
        else:
            from aiorch_server.scheduling.sequence import SequenceScheduler, build_sequence_schedulers

            scheduler = SchedulerGroup(build_sequence_schedulers(plan, spec, len(contexts)))
            sequencer = SequenceScheduler(
                plan,
                public,
                scheduler.members,
                queue_size=self.default_queue_size,
                isolate_failures=isolates,
            )
        instances = InstanceGroup(
            f"{model.name}:{version}",
            scheduler,
            loading,
            signature,
            contexts,
            make_samples(config, signature, model.directory),
            isolate_failures=isolates,
            before_serving=self._before_serving,
        )
        source.retain()
        instances.ended.add_done_callback(lambda _: source.release())
        instances.start(max(0.0, self.startup_timeout_s - (time.monotonic() - started)))
        seconds = time.monotonic() - started
        servable = Servable(
            model.name,
            version,
            config=config,
            signature=public,
            platform=config.platform,
            spec=spec,
            scheduler=scheduler,
            instances=instances,
            sequencer=sequencer,
            fingerprint=fingerprint,
            load_seconds=seconds,
        )
        if self._identifies:
            servable.identity = model.identify(version)
        return servable


def _add_labels(signature: ModelSignature, declared: DeclaredSignature) -> ModelSignature:
    """What the artefact says about outputs, with the labels of the configuration's label files."""
    labels = {spec.name: spec.labels for spec in declared.outputs}
    outputs = (replace(spec, labels=labels.get(spec.name) or spec.labels) for spec in signature.outputs)
    return replace(signature, outputs=tuple(outputs))


def _complete_config(
    config: ModelConfig, signature: ModelSignature, backend: Backend, places: tuple[Place, ...]
) -> ModelConfig:
    """The configuration as served: what the artefact says, where the owner wrote nothing."""
    platform = backend.platforms[0] if backend.platforms else ""
    return config.with_signature(signature, backend.name, platform, instances=len(places))


def _check_parameters(name: str, parameters: Mapping[str, str], backend: Backend) -> None:
    for flag in FLAGS:
        read_flag(parameters, flag)
    if backend.parameters is None:
        return
    problems = list(find_unknown_parameters(parameters, backend.name, backend.parameters))
    if problems:
        raise ModelLoadError(f"invalid configuration of model '{name}': {format_problems(problems)}")
    for note in find_idle_parameters(parameters, backend.parameters):
        logger.warning("model '%s': %s", name, note)


def _read_threads(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.strip().isdecimal() or not 1 <= int(text) <= 1024:
        raise ModelLoadError(f"parameter 'cpu_threads' is '{text}', a whole number from 1 to 1024 is right")
    return int(text)
