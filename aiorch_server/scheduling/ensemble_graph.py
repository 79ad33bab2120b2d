"""The graph of an ensemble: which step writes and reads which tensor, what a request needs of it, and what fits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from aiorch_server.config.ensemble import PLATFORM
from aiorch_server.config.model import ModelConfig
from aiorch_server.types import DataType, ModelSignature, RequestedOutput, TensorSpec

#: A step's model as requests name it: the version is "" for the one that the model's policy chooses.
ModelKey = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Step:
    """One model of an ensemble; ``inputs`` and ``outputs`` map its tensors' names to those of the ensemble."""

    index: int
    model: ModelKey
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    def __str__(self) -> str:
        return f"step {self.index}, model '{self.model[0]}'"


@dataclass(frozen=True, slots=True)
class Stage:
    """Ordinary steps that run once for each answer of ``opener``, a decoupled step; the first stage has none.

    ``is_chain``: each of them needs the one before.
    """

    opener: Step | None
    steps: tuple[Step, ...]
    is_chain: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What one kind of request needs: its steps in an order that works, and how many read each tensor in the end.

    ``stages`` are the same steps, each stage for every answer of the one before; ``shared`` are tensors that more than
    one reads, or one more than once; ``asked`` are the outputs to ask each step for, by its index.
    """

    steps: tuple[Step, ...]
    readers: Mapping[str, int]
    stages: tuple[Stage, ...]
    shared: frozenset[str]
    asked: Mapping[int, tuple[RequestedOutput, ...]]


class EnsembleGraph:
    """The steps of a configuration that ``config.ensemble`` has found right; immutable but for its memory of plans.

    ``decoupled`` are those of its models whose requests have any number of answers.
    """

    def __init__(self, config: ModelConfig, decoupled: Collection[ModelKey] = ()) -> None:
        assert config.ensemble_scheduling is not None
        self.steps = tuple(
            Step(
                index,
                (each.model_name, str(each.model_version) if each.model_version > 0 else ""),
                dict(each.input_map),
                dict(each.output_map),
            )
            for index, each in enumerate(config.ensemble_scheduling.step)
        )
        self.outputs = tuple(each.name for each in config.output)
        self.decoupled = frozenset(decoupled)
        self._writers = {tensor: step for step in self.steps for tensor in step.outputs.values()}
        self._order = self._sort()
        #: The decoupled steps that a tensor is behind, the first first; those of no such step are left out.
        self._origins: dict[str, tuple[Step, ...]] = {}
        self._trace()
        self._plans: dict[frozenset[str], Plan] = {}

    @property
    def models(self) -> tuple[ModelKey, ...]:
        """The models of all steps, each once."""
        return tuple(dict.fromkeys(step.model for step in self.steps))

    def plan(self, wanted: Collection[str]) -> Plan:
        """What has to run for these outputs; none means all. Steps that lead to no wanted output are left out."""
        key = frozenset(wanted or self.outputs)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._make_plan(key)
            if len(self._plans) < 1 << 10:  # a client may ask for every combination
                self._plans[key] = plan
        return plan

    def _make_plan(self, wanted: frozenset[str]) -> Plan:
        needed = set(wanted)
        steps = []
        for step in reversed(self._order):
            if needed.intersection(step.outputs.values()):
                steps.append(step)
                needed.update(step.inputs.values())
        readers = dict.fromkeys(wanted, 1)
        for step in steps:
            for tensor in step.inputs.values():
                readers[tensor] = readers.get(tensor, 0) + 1
        steps.reverse()
        stages: list[tuple[Step | None, list[Step]]] = [(None, [])]
        shared = {tensor for tensor, count in readers.items() if count > 1}
        for step in sorted(steps, key=self.find_depth):  # stable: the order within a stage stays
            depth = self.find_depth(step)
            shared.update(each for each in step.inputs.values() if len(self._origins.get(each, ())) < depth)
            if step.model in self.decoupled:
                stages.append((step, []))
            else:
                stages[depth][1].append(step)
        return Plan(
            tuple(steps),
            readers,
            tuple(Stage(opener, tuple(ordinary), _is_chain(ordinary)) for opener, ordinary in stages),
            frozenset(shared),
            {
                step.index: tuple(RequestedOutput(given) for given, tensor in step.outputs.items() if tensor in readers)
                for step in steps
            },
        )

    def find_depth(self, step: Step) -> int:
        """How many decoupled steps, one after the other, ``step`` comes behind."""
        return len(self._find_origin(step))

    def _trace(self) -> None:
        for step in self._order:
            origin = self._find_origin(step)
            if step.model in self.decoupled:
                origin = (*origin, step)
            if origin:
                self._origins.update(dict.fromkeys(step.outputs.values(), origin))

    def _find_origin(self, step: Step) -> tuple[Step, ...]:
        return max((self._origins.get(tensor, ()) for tensor in step.inputs.values()), key=len)

    def find_joins(self, name: str) -> Iterator[str]:
        """Yields a sentence for each place where answers of decoupled steps meet that do not belong together."""
        for step in self._order:
            if models := self._find_strangers(step.inputs.values()):
                yield (
                    f"in ensemble {name}, step of model '{step.model[0]}' receives inputs originated from different "
                    f"decoupled models ({models}): which of their answers belong together is not defined"
                )
        if models := self._find_strangers(self.outputs):
            yield (
                f"in ensemble {name}, the outputs originate from different decoupled models ({models}): which of their "
                "answers belong together is not defined"
            )

    def _find_strangers(self, tensors: Collection[str]) -> str:
        """Two decoupled models of which neither is behind the other, in words; empty if there are none."""
        origins = sorted((self._origins.get(tensor, ()) for tensor in tensors), key=len)
        for one in origins:
            other = origins[-1]
            if one != other[: len(one)]:
                pair = next(pair for pair in zip(one, other, strict=False) if pair[0] != pair[1])
                first, second = sorted(pair, key=lambda step: step.index)
                return f"{first} and {second}"
        return ""

    def _sort(self) -> tuple[Step, ...]:
        ordered: list[Step] = []
        left = list(self.steps)
        while left:
            waiting = {tensor for step in left for tensor in step.outputs.values()}
            ready = [step for step in left if waiting.isdisjoint(step.inputs.values())]
            ordered += ready
            left = [step for step in left if step not in ready]
        return tuple(ordered)

    def find_mismatches(
        self, name: str, signature: ModelSignature, models: Mapping[ModelKey, ModelSignature]
    ) -> Iterator[str]:
        """Yields a sentence for each thing in which ensemble and models do not fit; texts as Triton has them."""
        known: dict[str, _Node] = {}
        for spec in (*signature.inputs, *signature.outputs):
            known[spec.name] = _Node(name, spec.datatype, spec.shape, signature.max_batch_size > 0)
        for step in self._order:
            if step.model in models:
                yield from self._find_step_mismatches(name, signature, step, models[step.model], known)

    def _find_step_mismatches(
        self, name: str, signature: ModelSignature, step: Step, model: ModelSignature, known: dict[str, _Node]
    ) -> Iterator[str]:
        where, (model_name, _) = f"in ensemble {name}", step.model
        if 0 < model.max_batch_size < signature.max_batch_size:
            yield (
                f"ensemble {name} allows maximum batch size {signature.max_batch_size}, but it contains model "
                f"{model_name} which only allows maximum batch size to be {model.max_batch_size}"
            )
        inputs = {spec.name: spec for spec in model.inputs}
        outputs = {spec.name: spec for spec in model.outputs}
        for spec in model.inputs:
            if spec.name not in step.inputs and not spec.optional:
                yield f"{where}, input {spec.name} in model {model_name} is not mapped to any ensemble tensors"
        for given, tensor in step.inputs.items():
            if given not in inputs:
                yield (
                    f"{where}, ensemble tensor {tensor} is mapping to non-existing input {given} in model {model_name}"
                )
        for given, tensor in step.outputs.items():
            if given not in outputs:
                yield (
                    f"{where}, ensemble tensor {tensor} is mapped from non-existing output {given} in model "
                    f"{model_name}"
                )
        for specs, mapping in ((inputs, step.inputs), (outputs, step.outputs)):
            for given, tensor in mapping.items():
                if given in specs:
                    node = _Node.of(model_name, specs[given], model)
                    problem = known.setdefault(tensor, node).find_conflict(node)
                    if problem:
                        yield f"{where}, ensemble tensor {tensor}: {problem}"


def _is_chain(steps: Sequence[Step]) -> bool:
    return all(not set(before.outputs.values()).isdisjoint(after.inputs.values()) for before, after in pairwise(steps))


@dataclass(frozen=True, slots=True)
class _Node:
    """What one model says about an ensemble tensor."""

    model: str
    datatype: DataType
    dims: tuple[int, ...]
    is_batched: bool

    @classmethod
    def of(cls, model: str, spec: TensorSpec, signature: ModelSignature) -> _Node:
        return cls(model, spec.datatype, spec.shape, signature.max_batch_size > 0)

    @property
    def full_dims(self) -> tuple[int, ...]:
        return (-1, *self.dims) if self.is_batched else self.dims

    def find_conflict(self, other: _Node) -> str:
        if self.datatype is not other.datatype:
            return (
                f"inconsistent data type: {self.datatype.config_name} is inferred from model {self.model} while "
                f"{other.datatype.config_name} is inferred from model {other.model}"
            )
        # A batching and another model may pass a tensor on if the whole shapes agree.
        if not fits(self.dims, other.dims) and not fits(self.full_dims, other.full_dims):
            return (
                f"inconsistent shape: {_write(self.full_dims)} is inferred from model {self.model} while "
                f"{_write(other.full_dims)} is inferred from model {other.model}"
            )
        return ""


def fits(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether the shapes agree where neither says -1."""
    return len(one) == len(other) and all(-1 in (a, b) or a == b for a, b in zip(one, other, strict=True))


def convert_shape(dims: Sequence[int], is_batching: bool, rows: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which a tensor goes on where one side batches and the other does not.

    ``rows`` is the batch size of whoever made the tensor, 0 if it does not batch; ``dims`` are the taker's, without
    its batch dimension. Otherwise, and where no rule applies, the shape stays what it is.
    """
    if is_batching == bool(rows):
        return shape
    if is_batching and fits(dims, shape):
        return (1, *shape)
    if rows == 1 and not is_batching and not fits(dims, shape):
        return shape[1:]
    return shape


def _write(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


__all__ = ["PLATFORM", "EnsembleGraph", "ModelKey", "Plan", "Step", "convert_shape", "fits"]
