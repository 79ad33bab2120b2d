"""ONNX models (``model.onnx``) on ONNX Runtime; the framework is imported when the first model is loaded.

Parameters: ``intra_op_thread_count`` (instead of the instance's CPU share), ``graph_optimization_level``
(``disable``, ``basic``, ``extended``, ``all``), ``require_gpu`` (refuse to fall back to the CPU).
"""

from aiorch_backends.onnxruntime.backend import OnnxRuntimeBackend

__all__ = ["OnnxRuntimeBackend"]
