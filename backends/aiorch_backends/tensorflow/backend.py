"""The TensorFlow backend: process-wide threads, device choice, and the two formats."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

from aiorch_backends.common import OpenedArtefacts, complete_signature, import_framework, is_set, refuse
from aiorch_server.backend import Backend, LoadContext, ModelInstance
from aiorch_server.types import ModelSignature

if TYPE_CHECKING:
    from aiorch_backends.tensorflow.programs import OpenedProgram

logger = logging.getLogger(__name__)


class TensorFlowBackend(Backend):
    """Serves SavedModels and Keras files; each instance has its own copy of the model.

    What opens and runs models is imported with the first of them: every server knows this class.
    """

    name = "tensorflow"
    platforms = ("tensorflow_savedmodel", "tensorflow", "keras")
    artefacts = ("model.savedmodel", "model.keras")
    parameters = ("require_gpu", "signature_name")

    def __init__(self) -> None:
        self._programs: OpenedArtefacts[OpenedProgram] = OpenedArtefacts()
        self._lock = threading.Lock()
        self._threads: int | None = None

    def inspect(self, context: LoadContext) -> ModelSignature:
        """The serving signature; a None first dimension in all tensors means batching."""
        program = self._open(context)
        signature = complete_signature(context, program.inputs, program.outputs)
        self._programs.put(context, program)
        return signature

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        """Opens the model, or takes the one that ``inspect`` opened."""
        from aiorch_backends.tensorflow.instance import TensorFlowInstance

        program = self._programs.take(context) or self._open(context)
        return TensorFlowInstance(program, signature, _choose_device(context, import_tensorflow()))

    def _open(self, context: LoadContext) -> OpenedProgram:
        from aiorch_backends.tensorflow.programs import open_keras, open_saved_model

        tf = import_tensorflow()
        self._set_threads(context, tf)
        with tf.device(_choose_device(context, tf)):
            if context.artefact.suffix == ".keras":
                return open_keras(context, tf)
            return open_saved_model(context, tf)

    def _set_threads(self, context: LoadContext, tf: Any) -> None:
        with self._lock:
            if self._threads is None:
                try:
                    tf.config.threading.set_intra_op_parallelism_threads(context.threads)
                    tf.config.threading.set_inter_op_parallelism_threads(1)
                    self._threads = context.threads
                except RuntimeError:  # some other code of this process used TensorFlow before
                    self._threads = tf.config.threading.get_intra_op_parallelism_threads()
            if self._threads != context.threads:
                logger.info(
                    "model '%s': TensorFlow keeps %d threads (0: its own choice), %d were asked for; the process has "
                    "one pool, sized by the first model",
                    context.model_name, self._threads, context.threads,
                )  # fmt: skip


def import_tensorflow() -> Any:
    """The framework; ModelLoadError when it is missing."""
    return import_framework("tensorflow", extra="tensorflow")


def _choose_device(context: LoadContext, tf: Any) -> str:
    """TensorFlow's name of the wished device; the CPU with a warning, or a refusal, where there is no such GPU."""
    if not context.device.startswith("cuda"):
        return "/CPU:0"
    index = int(context.device.partition(":")[2] or 0)
    count = len(tf.config.list_physical_devices("GPU"))
    if index < count:
        return f"/GPU:{index}"
    if is_set(context, "require_gpu"):
        raise refuse(context, f"device {context.device} is required, but TensorFlow sees {count} GPUs")
    logger.warning(
        "model '%s' asked for %s but runs on the CPU: TensorFlow sees %d GPUs",
        context.model_name, context.device, count,
    )  # fmt: skip
    return "/CPU:0"
