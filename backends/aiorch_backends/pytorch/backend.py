"""The PyTorch backend: tells the two formats apart and places programs on a device."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiorch_backends.common import OpenedArtefacts, is_set, refuse, require_artefact
from aiorch_server.backend import Backend, LoadContext, ModelInstance
from aiorch_server.types import ModelSignature

if TYPE_CHECKING:
    from aiorch_backends.pytorch.tensors import TorchProgram

logger = logging.getLogger(__name__)


class PyTorchBackend(Backend):
    """Serves ``model.pt2`` and ``model.pt``; each instance has its own copy of the program.

    What opens and runs programs is imported with the first of them: every server knows this class.
    """

    name = "pytorch"
    platforms = ("pytorch_libtorch", "pytorch", "torch")
    artefacts = ("model.pt2", "model.pt")
    parameters = ("require_gpu",)

    def __init__(self) -> None:
        self._programs: OpenedArtefacts[TorchProgram] = OpenedArtefacts()

    def inspect(self, context: LoadContext) -> ModelSignature:
        """The signature in the exported program, or the declared one checked against ``forward``'s arguments."""
        program = _open_program(context)
        signature = program.inspect(context)
        self._programs.put(context, program)
        return signature

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        """Binds a program to the context's device; to be called in the thread that will run it."""
        from aiorch_backends.pytorch.instance import TorchInstance

        program = self._programs.take(context) or _open_program(context)
        device = _choose_device(context)
        try:
            call = program.bind(signature, device)
        except Exception as error:
            raise refuse(context, error) from error
        return TorchInstance(call, signature, device, context.threads)


def _open_program(context: LoadContext) -> TorchProgram:
    path: Path = require_artefact(context)
    if path.suffix == ".pt2":
        from aiorch_backends.pytorch.exported import ExportedProgram

        return ExportedProgram.open(context)
    from aiorch_backends.pytorch.scripted import ScriptedProgram

    return ScriptedProgram.open(context)


def _choose_device(context: LoadContext) -> str:
    """The wished device where torch has it; else the CPU, with a warning, or a refusal under ``require_gpu``."""
    from aiorch_backends.pytorch.tensors import import_torch

    torch: Any = import_torch()
    if not context.device.startswith("cuda"):
        return "cpu"
    index = int(context.device.partition(":")[2] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index < count:
        return f"cuda:{index}"
    if is_set(context, "require_gpu"):
        raise refuse(context, f"device {context.device} is required, but torch sees {count} CUDA devices")
    logger.warning(
        "model '%s' asked for %s but runs on the CPU: torch sees %d CUDA devices",
        context.model_name, context.device, count,
    )  # fmt: skip
    return "cpu"
