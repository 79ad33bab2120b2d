"""The configuration of one model, with Triton's keys.

The keys are those of ``ModelConfig`` in the protocol's model_config.proto, so that a configuration can be written as
``config.pbtxt``, ``config.yaml`` or the JSON of a load request, and served back by the ModelConfig call.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from aiorch_server.backend import DeclaredSignature
from aiorch_server.config.batching import DynamicBatching, EnsembleScheduling
from aiorch_server.config.ensemble import find_ensemble_problems
from aiorch_server.config.labels import find_label_problems
from aiorch_server.config.names import check_name
from aiorch_server.config.objective import find_objective_problems
from aiorch_server.config.placement import (
    InstanceGroup,
    InstanceKind,
    LatestVersions,
    ModelMetrics,
    ModelOperations,
    Optimization,
    RepositoryAgents,
    ResponseCache,
    TransactionPolicy,
    VersionPolicy,
)
from aiorch_server.config.problems import (
    Location,
    Problem,
    format_found,
    format_problems,
    raise_problems,
    validate_whole,
)
from aiorch_server.config.ragged import find_ragged_problems
from aiorch_server.config.reshape import find_reshape_problems
from aiorch_server.config.section import FileName, Int32, Section
from aiorch_server.config.sequence import SequenceBatching
from aiorch_server.config.support import find_refused, find_without_effect
from aiorch_server.config.tensors import BatchInput, BatchOutput, ModelInput, ModelOutput, ModelWarmup
from aiorch_server.errors import ModelLoadError
from aiorch_server.types import ModelSignature, TensorSpec


class ModelParameter(Section):
    """One free parameter for the backend."""

    string_value: str = ""


def _read_parameter(value: object) -> object:
    """Plain scalars stand for their text; true and false in lower case, as backends expect them."""
    if isinstance(value, bool):
        return {"string_value": str(value).lower()}
    if isinstance(value, str | int | float):
        return {"string_value": str(value)}
    return value


class ModelConfig(Section):
    """What the owner of a model wrote about it; None and empty stand for "not written".

    Built by ``from_dict`` or ``from_json``, which raise ModelLoadError with all problems at once; the constructor
    itself raises pydantic's ValidationError.
    """

    # Values are shown in our own words; pydantic's text would repeat whole configurations.
    model_config = ConfigDict(hide_input_in_errors=True)

    name: str = ""
    platform: str = ""
    backend: str = ""
    runtime: str = ""
    version_policy: VersionPolicy | None = None
    max_batch_size: Annotated[Int32, Field(ge=0)] | None = None
    input: tuple[ModelInput, ...] = ()
    output: tuple[ModelOutput, ...] = ()
    batch_input: tuple[BatchInput, ...] = ()
    batch_output: tuple[BatchOutput, ...] = ()
    optimization: Optimization | None = None
    dynamic_batching: DynamicBatching | None = None
    sequence_batching: SequenceBatching | None = None
    ensemble_scheduling: EnsembleScheduling | None = None
    instance_group: tuple[InstanceGroup, ...] = ()
    default_model_filename: FileName = ""
    cc_model_filenames: Mapping[str, str] = {}
    metric_tags: Mapping[str, str] = {}
    parameters: Mapping[str, Annotated[ModelParameter, BeforeValidator(_read_parameter)]] = {}
    model_warmup: tuple[ModelWarmup, ...] = ()
    model_operations: ModelOperations | None = None
    model_transaction_policy: TransactionPolicy | None = None
    model_repository_agents: RepositoryAgents | None = None
    response_cache: ResponseCache | None = None
    model_metrics: ModelMetrics | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, folder: str = "", source: str = "") -> Self:
        """The configuration in ``data``; ``folder`` is the model's folder name, which ``name`` must equal if written.

        ``source`` says in errors where ``data`` comes from. Raises ModelLoadError with every problem and its path.
        """
        values = dict(data)
        problems: list[Problem] = []
        if folder:
            written = values.setdefault("name", folder) or folder
            values["name"] = folder
            if written != folder:
                text = f"found {format_found(written)}; it must equal the model's folder name '{folder}'"
                problems.append(Problem(("name",), text))
        config, found = validate_whole(cls, values)
        problems += found
        if config is None or problems:
            where = source or (f"model '{folder}'" if folder else "the model")
            raise ModelLoadError(f"invalid configuration of {where}: {format_problems(problems)}")
        return config

    @classmethod
    def from_json(cls, text: str | bytes, *, folder: str = "", source: str = "") -> Self:
        """The configuration in a JSON object, as a load request carries it; see ``from_dict``."""
        return cls.from_dict(read_json(text, source or f"model '{folder}'"), folder=folder, source=source)

    def to_dict(self) -> dict[str, Any]:
        """A dict that protobuf's JSON parser reads as ModelConfig: proto field names, enum names, plain numbers."""
        return self.model_dump(mode="json", exclude_none=True, by_alias=True)

    @property
    def is_cached(self) -> bool:
        """Whether answers are to be kept for equal requests."""
        return self.response_cache is not None and self.response_cache.enable

    def to_strings(self) -> dict[str, str]:
        """The ``parameters`` as plain strings, as backends get them."""
        return {name: parameter.string_value for name, parameter in self.parameters.items()}

    def declare_signature(self, labels: Mapping[str, tuple[str, ...]] | None = None) -> DeclaredSignature:
        """The written part of the signature; ``labels`` gives the lines of label files by output name."""
        known = labels or {}
        return DeclaredSignature(
            inputs=tuple(TensorSpec(each.name, each.data_type, each.dims, each.optional) for each in self.input),
            outputs=tuple(
                TensorSpec(each.name, each.data_type, each.dims, labels=known.get(each.name, ()))
                for each in self.output
            ),
            max_batch_size=self.max_batch_size,
        )

    def with_signature(
        self,
        signature: ModelSignature,
        backend: str,
        platform: str,
        *,
        instances: int = 1,
        kind: InstanceKind = InstanceKind.KIND_CPU,
    ) -> Self:
        """The completed configuration as it is served.

        Tensors, batch size, backend and platform are those of the loaded artefact; ``instances`` fills in a missing
        instance group and ``kind`` stands in for KIND_AUTO without GPUs. Raises ModelLoadError where what was written
        contradicts the artefact.
        """
        problems = [*_find_strangers("input", self.input, signature.inputs)]
        problems += _find_strangers("output", self.output, signature.outputs)
        if problems:
            raise ModelLoadError(f"invalid configuration of model '{self.name}': {format_problems(problems)}")
        groups = self.instance_group or (InstanceGroup(count=instances),)
        inputs = {each.name: each for each in self.input}
        outputs = {each.name: each for each in self.output}
        completed = self.to_dict() | {
            "backend": backend,
            "platform": self.platform or platform,
            "max_batch_size": signature.max_batch_size,
            "version_policy": self.version_policy or VersionPolicy(latest=LatestVersions()),
            "input": [
                _written(inputs.get(spec.name)) | _described(spec) | {"optional": spec.optional}
                for spec in signature.inputs
            ],
            "output": [_written(outputs.get(spec.name)) | _described(spec) for spec in signature.outputs],
            "instance_group": [
                _written(group) | {"name": group.name or f"{self.name}_{index}"} | _placed(group, kind)
                for index, group in enumerate(groups)
            ],
        }
        if signature.is_decoupled:
            completed["model_transaction_policy"] = {"decoupled": True}
        return self.from_dict(completed, folder=self.name)

    def notes(self) -> tuple[str, ...]:
        """A sentence for each field that was read but has no effect in this version; for the log."""
        return tuple(find_without_effect(self))

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        unknown = (info.context or {}).get("unknown", ())
        raise_problems((*self._find_problems(unknown), *find_refused(self)))
        return self

    def _find_problems(self, unknown: Collection[str]) -> Iterator[Problem]:
        if self.name:
            try:
                check_name(self.name)
            except ValueError as error:
                yield Problem(("name",), f"found {format_found(self.name)}; {error}")
        yield from find_label_problems(self.to_strings())
        yield from find_objective_problems(self.to_strings())
        yield from _find_doubles("input", [each.name for each in self.input])
        yield from _find_doubles("output", [each.name for each in self.output])
        schedulers = ("dynamic_batching", "sequence_batching", "ensemble_scheduling")
        written = [name for name in schedulers if getattr(self, name) is not None]
        if len(written) > 1:
            yield Problem((written[1],), f"found beside {written[0]}; only one scheduler can be written")
        yield from find_ensemble_problems(self, unknown)
        yield from self._find_batching_problems()
        yield from self._find_sequence_problems()
        yield from self._find_cache_problems()
        yield from find_reshape_problems(self)
        yield from find_ragged_problems(self, unknown)

    def _find_cache_problems(self) -> Iterator[Problem]:
        if not self.is_cached:
            return
        policy, location = self.model_transaction_policy, ("response_cache", "enable")
        if self.sequence_batching is not None:
            yield Problem(
                location, "found true beside sequence_batching; answers that depend on earlier requests differ"
            )
        if policy is not None and policy.decoupled:
            yield Problem(
                location, "found true with model_transaction_policy.decoupled; only single answers are cached"
            )

    def _find_sequence_problems(self) -> Iterator[Problem]:
        sequences = self.sequence_batching
        if sequences is None:
            return
        given = {each.name for each in self.input}
        own = [(("control_input", i, "name"), each.name) for i, each in enumerate(sequences.control_input)]
        own += [(("state", i, "input_name"), each.input_name) for i, each in enumerate(sequences.state)]
        for location, name in own:
            if name in given:
                text = f"found '{name}', which is an input too; the server gives it, leave it out of 'input'"
                yield Problem(("sequence_batching", *location), text)
        if sequences.oldest is not None and self.max_batch_size is not None:
            for index, size in enumerate(sequences.oldest.preferred_batch_size):
                if size > max(self.max_batch_size, 1):
                    text = f"found {size}; it must be at most max_batch_size, which is {self.max_batch_size}"
                    yield Problem(("sequence_batching", "oldest", "preferred_batch_size", index), text)

    def _find_batching_problems(self) -> Iterator[Problem]:
        largest, batching = self.max_batch_size, self.dynamic_batching
        if largest is None:
            return
        if batching is not None and largest == 0:
            yield Problem(("dynamic_batching",), "needs max_batch_size above 0, found 0")
        elif batching is not None:
            policy = self.model_transaction_policy
            if batching.preserve_ordering and policy is not None and policy.decoupled:
                text = "found true with model_transaction_policy.decoupled; answers that come one by one keep no order"
                yield Problem(("dynamic_batching", "preserve_ordering"), text)
            for index, size in enumerate(batching.preferred_batch_size):
                if size > largest:
                    text = f"found {size}; it must be at most max_batch_size, which is {largest}"
                    yield Problem(("dynamic_batching", "preferred_batch_size", index), text)
        for index, warmup in enumerate(self.model_warmup):
            if warmup.batch_size > max(largest, 1):
                text = f"found {warmup.batch_size}; it must be at most {max(largest, 1)} (max_batch_size is {largest})"
                yield Problem(("model_warmup", index, "batch_size"), text)


def read_json(text: str | bytes, source: str) -> dict[str, Any]:
    """The JSON object in ``text``; ModelLoadError for anything else, doubled keys included."""

    def read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"key '{key}' is written more than once")
            result[key] = value
        return result

    try:
        data = json.loads(text, object_pairs_hook=read_object)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ModelLoadError(f"configuration of {source} is not valid JSON: {reason}") from None
    if not isinstance(data, dict):
        raise ModelLoadError(f"configuration of {source} must be a JSON object, found {format_found(data)}")
    return data


def _find_doubles(field: str, names: list[str]) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            yield Problem((field, index, "name"), f"found '{name}' for the second time; names must differ")
        seen.add(name)


def _find_strangers(
    field: str, written: Sequence[ModelInput | ModelOutput], specs: tuple[TensorSpec, ...]
) -> Iterator[Problem]:
    names = [spec.name for spec in specs]
    for index, tensor in enumerate(written):
        if tensor.name not in names:
            location: Location = (field, index, "name")
            yield Problem(location, f"found '{tensor.name}'; the model has {', '.join(names) or 'none'}")


def _written(section: Section | None) -> dict[str, Any]:
    return section.model_dump(mode="json", exclude_none=True, by_alias=True) if section is not None else {}


def _placed(group: InstanceGroup, default: InstanceKind) -> dict[str, Any]:
    kind = group.kind
    if kind is InstanceKind.KIND_AUTO:
        kind = InstanceKind.KIND_GPU if group.gpus else default
    return {"kind": kind, "gpus": group.gpus or ((0,) if kind is InstanceKind.KIND_GPU else ())}


def _described(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": spec.datatype, "dims": spec.shape}
