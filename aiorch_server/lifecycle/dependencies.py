"""Ensembles in the lifecycle: one serves while the models of its steps do, and fits them as they are now."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from aiorch_server._core import ModelSpec
from aiorch_server.cache import hash_version
from aiorch_server.config.ensemble import PLATFORM
from aiorch_server.config.model import ModelConfig
from aiorch_server.config.placement import LatestVersions, VersionPolicy
from aiorch_server.errors import ModelLoadError
from aiorch_server.lifecycle.model import ManagedModel
from aiorch_server.lifecycle.servable import Servable
from aiorch_server.repository import RepositoryModel
from aiorch_server.routing import Traffic
from aiorch_server.scheduling.ensemble_graph import EnsembleGraph, ModelKey
from aiorch_server.types import ModelSignature


class Dependencies:
    """Which ensemble needs which models, over the manager's own table of models; for the event loop's thread."""

    def __init__(self, models: Mapping[str, ManagedModel], traffic: Mapping[str, Traffic]) -> None:
        self._models = models
        self._traffic = traffic
        #: Whose load waits for whose: a ring would wait for ever.
        self._waits: dict[str, set[str]] = {}

    @contextlib.contextmanager
    def waiting(self, name: str, wanted: str, kind: str = "ensembles") -> Iterator[None]:
        """While ``name`` waits for the load of ``wanted``; ModelLoadError if that waits for ``name``, however far."""
        path = self._find_path(wanted, name)
        if path:
            raise ModelLoadError(f"circular dependency between {kind}: {' -> '.join((name, *path))}")
        waits = self._waits.setdefault(name, set())
        waits.add(wanted)
        try:
            yield
        finally:
            waits.discard(wanted)
            if not waits:
                self._waits.pop(name, None)

    def _find_path(self, start: str, end: str) -> list[str]:
        paths = [[start]]
        seen = {start}
        while paths:
            path = paths.pop()
            if path[-1] == end:
                return path
            for following in self._waits.get(path[-1], ()):
                if following not in seen:
                    seen.add(following)
                    paths.append([*path, following])
        return []

    def build(
        self, opened: RepositoryModel, version: int, fingerprint: str, max_requests: int, failures: Mapping[str, str]
    ) -> Servable:
        """An ensemble that serves as soon as it is published; ModelLoadError with everything that does not fit.

        ``failures`` tells why models of steps did not load.
        """
        declared = opened.declared
        graph = EnsembleGraph(opened.config)
        decoupled = self._find_decoupled(graph)
        graph = EnsembleGraph(opened.config, decoupled)
        signature = ModelSignature(
            declared.inputs, declared.outputs, declared.max_batch_size or 0, is_decoupled=bool(decoupled)
        )
        problems = [
            *self._find_unmet(opened.name, graph, failures),
            *self._find_unfit(opened.name, graph, signature),
            *graph.find_joins(opened.name),
        ]
        if not problems:
            problems += _find_policy_problems(opened.config, graph)
        if problems:
            raise ModelLoadError("; ".join(problems))
        config = _complete_config(opened.config, signature)
        try:
            spec = ModelSpec(opened.name, version, signature)
        except (ValueError, OverflowError) as error:
            raise ModelLoadError(f"'{opened.name}' version {version} cannot be served: {error}") from error
        from aiorch_server.scheduling.ensemble import EnsembleScheduler

        ensemble = EnsembleScheduler(opened.name, version, config, signature, max_requests, decoupled)
        return Servable(
            opened.name,
            version,
            config=config,
            signature=signature,
            platform=PLATFORM,
            spec=spec,
            scheduler=ensemble,
            instances=ensemble,
            fingerprint=fingerprint,
            ensemble=ensemble,
        )

    def follow(self) -> None:
        """Takes out of service what lost a model that it needs, or does not fit it any more, and brings it back.

        Called before each publication, so that an ensemble and its steps come and go in one table.
        """
        is_settled = False
        while not is_settled:  # an ensemble may be a step of another
            is_settled = True
            for model in self._models.values():
                for record in model.versions.values():
                    servable = record.servable
                    if servable is None or servable.ensemble is None:
                        continue
                    graph = servable.ensemble.graph
                    problems = [
                        *self._find_unmet(model.name, graph, {}),
                        *self._find_unfit(model.name, graph, servable.signature),
                    ]
                    if model.follow_steps(record, "; ".join(problems)):
                        is_settled = False
                    if servable.cache is not None and not problems:
                        servable.cache.follow(self._hash_steps(graph))

    def _hash_steps(self, graph: EnsembleGraph) -> Iterator[bytes]:
        """One hash for each model that answers depend on, those of ensembles among the steps included."""
        for key in graph.models:
            for found in self._list_found(key):
                yield hash_version(found.name, found.version, found.identity, found.config.to_dict())
                if found.ensemble is not None:
                    yield from self._hash_steps(found.ensemble.graph)

    def list_hopeful(self) -> list[str]:
        """Ensembles that did not load because a model was missing which serves now; each is named once."""
        hopeful = []
        for model in self._models.values():
            if model.is_waiting and model.is_wanted and not model.is_on_demand and self.are_met(model):
                model.is_waiting = False
                hopeful.append(model.name)
        return hopeful

    def list_unneeded(self, name: str) -> list[str]:
        """Models that were loaded for ``name`` only: nobody asked for them, and nobody else needs them."""
        needed = {
            key[0]
            for model in self._models.values()
            if model.name != name and model.is_wanted
            for key in model.requires
        }
        names = dict.fromkeys(key[0] for key in self._models[name].requires)
        # what is unloaded already is passed over: ensembles that need each other never loaded, but stand here
        loaded = {each: self._models[each] for each in names if each in self._models and self._models[each].is_wanted}
        return [each for each, model in loaded.items() if each not in needed and not model.is_asked]

    def are_met(self, model: ManagedModel) -> bool:
        """Whether all models that ``model`` needs serve."""
        return all(self._find(key) is not None for key in model.requires)

    def _find(self, key: ModelKey) -> Servable | None:
        """What an ensemble must fit: of the versions that share a step's requests the first, as everywhere."""
        return next(iter(self._list_found(key)), None)

    def _list_found(self, key: ModelKey) -> list[Servable]:
        """All versions that a step may run on."""
        name, version = key
        ready = self._models[name].ready() if name in self._models else {}
        traffic = self._traffic.get(name)
        if version:
            wanted = [int(version)]
        elif traffic is None:
            wanted = [max(ready, default=0)]
        else:
            wanted = [each.version for each in traffic.shares if each.share]
        return [ready[number] for number in wanted if number in ready]

    def _find_decoupled(self, graph: EnsembleGraph) -> frozenset[ModelKey]:
        found = ((key, self._find(key)) for key in graph.models)
        return frozenset(key for key, servable in found if servable is not None and servable.signature.is_decoupled)

    def _find_unmet(self, name: str, graph: EnsembleGraph, failures: Mapping[str, str]) -> Iterator[str]:
        for key in graph.models:
            if self._find(key) is not None:
                continue
            step, version = key
            model = self._models.get(step)
            text = f"ensemble '{name}' depends on '{step}'"
            if version and model is not None and model.ready():
                yield f"{text} whose required version {version} is not loaded"
            elif reason := failures.get(step, ""):
                yield f"{text} which has no loaded version. Model '{step}' loading failed with error: {reason}"
            else:
                reasons = [entry.reason for entry in model.index() if entry.reason] if model is not None else []
                yield f"{text} which has no loaded version" + (f" ({reasons[-1]})" if reasons else "")

    def _find_unfit(self, name: str, graph: EnsembleGraph, signature: ModelSignature) -> Iterator[str]:
        found = {key: servable for key in graph.models if (servable := self._find(key)) is not None}
        for key, servable in found.items():
            if servable.signature.is_decoupled != (key in graph.decoupled):
                change = "is decoupled now" if servable.signature.is_decoupled else "is not decoupled any more"
                yield f"in ensemble {name}, model {key[0]} {change}; load the ensemble again"
        for step in graph.steps:
            if step.model in found and found[step.model].sequencer is not None and graph.find_depth(step):
                yield (
                    f"in ensemble {name}, model {step.model[0]} batches sequences and is run for each answer of a "
                    "decoupled model: which of them begins or ends a sequence is not defined"
                )
        yield from graph.find_mismatches(name, signature, {key: each.signature for key, each in found.items()})


def list_requirements(config: ModelConfig) -> frozenset[ModelKey]:
    """The models that ``config`` needs to serve; empty but for ensembles."""
    return frozenset() if config.ensemble_scheduling is None else frozenset(EnsembleGraph(config).models)


def _find_policy_problems(config: ModelConfig, graph: EnsembleGraph) -> Iterator[str]:
    """What the configuration says about decoupled answers against what the models of the steps do."""
    policy = config.model_transaction_policy
    where = f"in ensemble {config.name}, model_transaction_policy.decoupled"
    names = ", ".join(sorted(name for name, _ in graph.decoupled))
    if policy is not None and policy.decoupled and not names:
        yield f"{where} is true, but no model of its steps is decoupled; write false or remove it"
    if policy is not None and not policy.decoupled and names:
        yield f"{where} is false, but {names} is decoupled, and so is the ensemble; write true or remove it"
    if names and config.is_cached:
        yield f"in ensemble {config.name}, response_cache.enable is true, but {names} is decoupled; write false"


def _complete_config(config: ModelConfig, signature: ModelSignature) -> ModelConfig:
    completed = config.to_dict() | {
        "platform": PLATFORM,
        "max_batch_size": signature.max_batch_size,
        "version_policy": config.version_policy or VersionPolicy(latest=LatestVersions()),
    }
    if signature.is_decoupled:
        completed["model_transaction_policy"] = {"decoupled": True}
    return ModelConfig.from_dict(completed, folder=config.name)
