"""Opening ONNX Runtime sessions: threads, providers, and what became of the wish for a GPU."""

from __future__ import annotations

import logging
from typing import Any

from aiorch_backends.common import import_framework, is_set, refuse, require_artefact
from aiorch_server.backend import LoadContext

logger = logging.getLogger(__name__)

_LEVELS = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
_ERRORS_ONLY = 3
_MOST_THREADS = 1024


def open_session(context: LoadContext) -> Any:
    """An ``onnxruntime.InferenceSession`` on the context's device; ModelLoadError naming the file.

    ONNX Runtime falls back to the CPU without an error, so the session is asked what it got: a fall back is logged,
    or refused where the parameter ``require_gpu`` says true.
    """
    path = require_artefact(context)
    runtime = import_framework("onnxruntime", extra="onnx")
    options = _build_options(context, runtime)
    available = runtime.get_available_providers()
    providers: list[Any] = ["CPUExecutionProvider"]
    wants_gpu = context.device.startswith("cuda")
    if wants_gpu and "CUDAExecutionProvider" in available:
        device_id = int(context.device.partition(":")[2] or 0)
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device_id}))
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        raise refuse(context, error) from error
    provider = session.get_providers()[0]
    if wants_gpu and provider != "CUDAExecutionProvider":
        if is_set(context, "require_gpu"):
            raise refuse(
                context,
                f"device {context.device} is required, but ONNX Runtime gave {provider}; available: "
                f"{', '.join(available)}. The GPU build is aiorchestrator[onnx-gpu]",
            )
        logger.warning(
            "model '%s' asked for %s but runs on %s; available providers: %s",
            context.model_name, context.device, provider, ", ".join(available),
        )  # fmt: skip
    return session


def _build_options(context: LoadContext, runtime: Any) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = _read_threads(context)
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    # A spinning pool burns the cores that other instances and the server's own threads live on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = _ERRORS_ONLY
    level = context.parameters.get("graph_optimization_level", "all").lower()
    if level not in _LEVELS:
        raise refuse(
            context, f"parameter 'graph_optimization_level' must be one of {', '.join(_LEVELS)}, not '{level}'"
        )
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, _LEVELS[level])
    return options


def _read_threads(context: LoadContext) -> int:
    text = context.parameters.get("intra_op_thread_count", str(context.threads))
    if not text.isdecimal() or not 0 < int(text) <= _MOST_THREADS:
        raise refuse(context, f"parameter 'intra_op_thread_count' must be from 1 to {_MOST_THREADS}, not '{text}'")
    return int(text)
