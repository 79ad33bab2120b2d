"""The ONNX Runtime backend: reads signatures from sessions, hands sessions to instances."""

from __future__ import annotations

import logging
from typing import Any

from aiorch_backends.common import FoundTensor, OpenedArtefacts, complete_signature, refuse
from aiorch_backends.onnxruntime.instance import BrainFloatInstance, NativeInstance, OnnxInstance, TextInstance
from aiorch_backends.onnxruntime.session import is_native, open_session
from aiorch_server.backend import Backend, LoadContext, ModelInstance
from aiorch_server.types import DataType, ModelSignature, TensorSpec

logger = logging.getLogger(__name__)

_TENSOR_TYPES = {
    "tensor(bool)": DataType.BOOL,
    "tensor(uint8)": DataType.UINT8,
    "tensor(uint16)": DataType.UINT16,
    "tensor(uint32)": DataType.UINT32,
    "tensor(uint64)": DataType.UINT64,
    "tensor(int8)": DataType.INT8,
    "tensor(int16)": DataType.INT16,
    "tensor(int32)": DataType.INT32,
    "tensor(int64)": DataType.INT64,
    "tensor(float16)": DataType.FP16,
    "tensor(float)": DataType.FP32,
    "tensor(double)": DataType.FP64,
    "tensor(string)": DataType.BYTES,
    "tensor(bfloat16)": DataType.BF16,
}


class OnnxRuntimeBackend(Backend):
    """Serves ``model.onnx``; one session per instance, so that instances share no thread pool."""

    name = "onnxruntime"
    platforms = ("onnxruntime_onnx", "onnx")
    artefacts = ("model.onnx",)
    runs_code = False
    parameters = ("graph_optimization_level", "intra_op_thread_count", "require_gpu")

    def __init__(self) -> None:
        self._sessions: OpenedArtefacts[Any] = OpenedArtefacts()

    def inspect(self, context: LoadContext) -> ModelSignature:
        """The signature in the graph: symbolic dimensions are -1, a symbolic first one everywhere means batching."""
        session = open_session(context)
        inputs = [_describe(context, "input", node) for node in session.get_inputs()]
        # Initializers that callers may override are offered only where the configuration asks for them.
        inputs += [
            _describe(context, "input", node, is_optional=True) for node in session.get_overridable_initializers()
        ]
        outputs = _describe_outputs(context, session.get_outputs())
        if all(tensor.shape and tensor.shape[0] == -1 for tensor in inputs if not tensor.is_optional):
            # ONNX Runtime shows a scalar and an unknown rank alike; beside batching inputs it is the latter.
            outputs = [FoundTensor(out.name, out.datatype, out.shape or None) for out in outputs]
        signature = complete_signature(context, [*inputs], outputs)
        self._sessions.put(context, session)
        return signature

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        """Opens a session, or takes the one that ``inspect`` opened."""
        session = self._sessions.take(context) or open_session(context)
        if is_native(session):
            return NativeInstance(session, signature)
        kinds = {spec.datatype for spec in (*signature.inputs, *signature.outputs)}
        if kinds >= {DataType.BYTES, DataType.BF16}:
            raise refuse(context, "ONNX Runtime's Python API cannot carry BYTES and BF16 tensors in one model")
        if DataType.BYTES in kinds:
            return TextInstance(session, signature)
        return BrainFloatInstance(session, signature) if DataType.BF16 in kinds else OnnxInstance(session, signature)


def _describe(context: LoadContext, kind: str, node: Any, *, is_optional: bool = False) -> FoundTensor:
    datatype = _TENSOR_TYPES.get(node.type)
    if datatype is None:
        raise refuse(context, f"{kind} '{node.name}' has type {node.type}, which the V2 protocol cannot carry")
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in node.shape)
    return FoundTensor(node.name, datatype, shape, is_optional)


def _describe_outputs(context: LoadContext, nodes: list[Any]) -> list[FoundTensor]:
    """The outputs that are tensors; sequences and maps are left out with a warning unless nothing else is there."""
    declared: dict[str, TensorSpec] = {spec.name: spec for spec in context.declared.outputs}
    tensors = [node for node in nodes if node.type in _TENSOR_TYPES]
    for node in nodes:
        if node.type in _TENSOR_TYPES:
            continue
        advice = "; models converted from scikit-learn need options={'zipmap': False}" if "map(" in node.type else ""
        if node.name in declared or not tensors:
            raise refuse(context, f"output '{node.name}' has type {node.type}, which is not a tensor{advice}")
        logger.warning(
            "model '%s': output '%s' of type %s is left out, it is not a tensor%s",
            context.model_name, node.name, node.type, advice,
        )  # fmt: skip
    return [_describe(context, "output", node) for node in tensors]
