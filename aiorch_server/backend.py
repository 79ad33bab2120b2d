"""The service-provider interface between the server and a framework.

A backend package registers a ``Backend`` subclass under the entry point group ``aiorch.backends``. The server creates
one ``Backend`` object per framework and process, asks it to ``inspect`` an artefact, and lets it ``load`` one
``ModelInstance`` per place in the instance group. Each instance is driven by one thread of its own.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from aiorch_server.types import ModelSignature, NumpyArray, TensorSpec


@dataclass(frozen=True, slots=True)
class DeclaredSignature:
    """The part of a signature that the model's configuration declares; None where it is silent."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    max_batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class LoadContext:
    """What a backend is told about the model version it loads.

    ``artefact`` is the version's file or folder (``<model>/<version>/model.onnx``); ``model_directory`` the model's
    folder. ``declared`` is the signature written in the model's configuration: its tensors may be empty (nothing
    written), its ``max_batch_size`` is None if the configuration does not say. ``threads`` is the CPU share of one
    instance, ``device`` is ``"cpu"`` or ``"cuda:<n>"``. ``parameters`` are the configuration's ``parameters`` as
    strings. Pickled artefacts may only be opened where ``allow_code`` is true: they run code when read.
    ``is_requested`` says that the configuration, and perhaps the artefact, came with a load request: unless
    ``allow_code`` is true it must not widen what the artefact may do.
    ``default_max_batch_size`` is what a model that can batch gets when its configuration does not say.
    """

    model_name: str
    model_version: int
    model_directory: Path
    artefact: Path
    declared: DeclaredSignature
    instance_index: int = 0
    threads: int = 1
    device: str = "cpu"
    parameters: Mapping[str, str] = field(default_factory=dict)
    allow_code: bool = False
    is_requested: bool = False
    default_max_batch_size: int = 32


class ModelInstance(abc.ABC):
    """One loaded copy of a model, used by one thread at a time."""

    @abc.abstractmethod
    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        """Runs one batch and gives all outputs by name.

        Contract: ``inputs`` holds C-contiguous arrays with the signature's dtypes; for a batching model their first
        dimension is the number of rows, the same in all. Absent optional inputs are left out. Arrays are only valid,
        and must not be kept, until the next call; outputs may alias them. Outputs of a batching model have the same
        number of rows. BYTES tensors are ``object`` arrays of ``bytes``, BF16 ``uint16`` bit patterns.
        Any exception fails the batch with INTERNAL, but an ``AiorchError`` keeps its own code.
        """

    @property
    def compiled(self) -> object | None:
        """A capsule of ``include/aiorch_instance.h`` where batches can run without the interpreter, else None.

        Asked once, after warm-up. All inputs and outputs must have types of a fixed item size. A batch that fails there
        is run again through ``execute``, member by member.
        """
        return None

    def close(self) -> None:  # noqa: B027 - most frameworks free with the object
        """Gives back what the instance holds; called once, when no batch runs."""


class Backend(abc.ABC):
    """One framework; stateless apart from process-wide settings of that framework."""

    #: The name in ``backend:`` of a model configuration, for example ``"onnxruntime"``.
    name: ClassVar[str]
    #: Names in ``platform:`` that mean this backend, for example ``("onnxruntime_onnx",)``; the first is reported.
    platforms: ClassVar[tuple[str, ...]] = ()
    #: Artefact names looked for in a version folder when the configuration names none, best first.
    artefacts: ClassVar[tuple[str, ...]] = ()
    #: Whether an artefact can run code of its author's choice when it is opened or served. Load requests may bring or
    #: choose such artefacts only where the operator allows code. False is a promise about hostile artefacts.
    runs_code: ClassVar[bool] = True

    @abc.abstractmethod
    def inspect(self, context: LoadContext) -> ModelSignature:
        """The signature of the artefact, completed from ``context.declared`` where the format does not hold it.

        Raises ModelLoadError with a text that says what is missing or contradicts the declaration, and where.
        May cache what it opened for the ``load`` that follows.
        """

    @abc.abstractmethod
    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        """Loads one instance that takes and gives exactly ``signature``; raises ModelLoadError."""
