"""Which model a request means, and how TensorFlow Serving says that there is none, or that its tensors do not fit.

Texts and codes are those of tensorflow_serving/model_servers and servables/tensorflow, whose clients look at them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from aiorch_server.errors import (
    AiorchError,
    Code,
    ModelNotReady,
    NotFoundError,
    RequestError,
    UnknownModel,
    UnknownVersion,
)
from aiorch_server.types import (
    InferenceRequest,
    InferenceResponse,
    ModelIndexEntry,
    ModelSignature,
    RequestedOutput,
    Tensor,
)

#: The one signature of every model.
SIGNATURE: Final = "serving_default"
#: No version is that high: it would not fit into the names of the repository's folders.
_VERSION_LIMIT: Final = 10**18
#: What the data plane puts in front of texts; requests of this protocol have no id.
_NO_ID: Final = "[request id: <id_unknown>] "
#: Runs a neutral request; how long it may take and who may give it up is the door's to say.
Infer = Callable[[InferenceRequest], Awaitable[InferenceResponse]]


class ServableNotFound(NotFoundError):
    """The model, or the version, does not serve."""


class UnknownSignature(RequestError):
    """Predict was asked for a signature that the model does not have; TensorFlow Serving has a code of its own."""

    code = Code.FAILED_PRECONDITION


class ModelCatalogue(Protocol):
    """The control plane's side."""

    async def bring(self, name: str, version: str = "", *, deadline_ns: int = 0) -> None:
        """Loads a model that requests load, so that it is there until something else is awaited."""
        ...

    def find_signature(self, name: str, version: str = "") -> tuple[int, ModelSignature]:
        """A version, "" for the default one, and what it takes and gives."""
        ...

    def foresee(self, name: str, version: str = "") -> tuple[int, ModelSignature]:
        """The version that the request at hand will run on, and what it takes and gives."""
        ...

    def find_labelled(self, name: str, label: str) -> int:
        """The version that has ``label``; RequestError if none has."""
        ...

    def repository_index(self, ready_only: bool) -> Sequence[ModelIndexEntry]:
        """What is managed or stored, and in which state."""
        ...

    def waiting_versions(self, name: str) -> Sequence[int]:
        """The versions of a model that the next request for it would load."""
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request names: a model, and perhaps a version by number or label, and a signature."""

    name: str
    version: int | None = None
    label: str = ""
    signature: str = ""

    @classmethod
    def read(cls, request: Any) -> Wanted:
        """From the ``model_spec`` of a message; RequestError without one."""
        if not request.HasField("model_spec"):
            raise RequestError("Missing ModelSpec")
        return cls.read_spec(request.model_spec)

    @classmethod
    def read_spec(cls, spec: Any) -> Wanted:
        """From a ModelSpec."""
        choice = spec.WhichOneof("version_choice")
        return cls(
            spec.name,
            spec.version.value if choice == "version" else None,
            spec.version_label if choice == "version_label" else "",
            spec.signature_name,
        )


@dataclass(frozen=True, slots=True)
class Served:
    """A version that serves; ``asked`` is what the data plane is asked for, "" for the one that it chooses."""

    name: str
    version: int
    asked: str
    signature: ModelSignature

    async def run(self, infer: Infer, inputs: Sequence[Tensor], outputs: Sequence[str] = ()) -> InferenceResponse:
        """Has ``inputs`` inferred; errors as ``infer`` raises them, in this protocol's words."""
        request = InferenceRequest(self.name, self.asked, inputs, [RequestedOutput(name) for name in outputs])
        try:
            return await infer(request)
        except (UnknownModel, UnknownVersion, ModelNotReady):
            raise _not_found(self.name, self.asked) from None
        except AiorchError as error:
            text = str(error)
            if not text.startswith(_NO_ID):
                raise
            raise error.restate(text.removeprefix(_NO_ID)) from error.__cause__


async def find_model(catalogue: ModelCatalogue, wanted: Wanted, *, is_run: bool = True, deadline_ns: int = 0) -> Served:
    """The version that serves ``wanted``; its signature's name is not looked at. ServableNotFound, RequestError.

    ``is_run``: a request is to be run on it; else somebody only asks. Loads it first where requests do that, until the
    deadline.
    """
    if wanted.name and (wanted.version is None or 0 < wanted.version < _VERSION_LIMIT):
        number = "" if wanted.label or wanted.version is None else str(wanted.version)
        await catalogue.bring(wanted.name, number, deadline_ns=deadline_ns)
    asked = resolve_version(catalogue, wanted)
    try:
        version, signature = (catalogue.foresee if is_run else catalogue.find_signature)(wanted.name, asked)
    except (UnknownModel, UnknownVersion, ModelNotReady):
        raise _not_found(wanted.name, asked) from None
    return Served(wanted.name, version, asked, signature)


def resolve_version(catalogue: ModelCatalogue, wanted: Wanted) -> str:
    """The version as the planes take it, "" where none is named; RequestError for an unknown label."""
    if not wanted.name:
        raise RequestError("ModelSpec has no name specified.")
    if wanted.label:
        return str(catalogue.find_labelled(wanted.name, wanted.label))
    if wanted.version is None:
        return ""
    if not 0 < wanted.version < _VERSION_LIMIT:
        raise _not_found(wanted.name, str(wanted.version))
    return str(wanted.version)


def is_known_signature(wanted: Wanted) -> bool:
    """Whether ``wanted`` names the one signature, or none."""
    return wanted.signature in ("", SIGNATURE)


async def find_example_model(catalogue: ModelCatalogue, wanted: Wanted, *, deadline_ns: int = 0) -> Served:
    """As ``find_model``, for Classify and Regress: RequestError for a signature that the model does not have."""
    model = await find_model(catalogue, wanted, deadline_ns=deadline_ns)
    if not is_known_signature(wanted):
        raise RequestError(f"No signature was found with the name: {wanted.signature}")
    return model


def check_names(signature: ModelSignature, given: Collection[str], outputs: Sequence[str]) -> None:
    """RequestError if ``given`` are not the inputs of the model, or it has no such ``outputs``."""
    known = {spec.name for spec in signature.inputs}
    required = {spec.name for spec in signature.inputs if not spec.optional}
    extra, missing = set(given) - known, required - set(given)
    if extra or missing:
        raise RequestError(
            f"input size does not match signature: {len(given)}!={len(known)} len({_braced(given)}) != "
            f"len({_braced(known)}). Sent extra: {_braced(extra)}. Missing but required: {_braced(missing)}."
        )
    names = {spec.name for spec in signature.outputs}
    seen: set[str] = set()
    for name in outputs:
        if name not in names:
            raise RequestError(
                f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                f"{_braced(names)}."
            )
        if name in seen:
            raise RequestError(f"duplicate output tensor alias: {name}")
        seen.add(name)


def _braced(names: Collection[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"


def _not_found(name: str, asked: str) -> ServableNotFound:
    which = f"Specific({name}, {asked})" if asked else f"Latest({name})"
    return ServableNotFound(f"Servable not found for request: {which}")
