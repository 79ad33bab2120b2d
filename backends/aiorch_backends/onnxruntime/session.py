"""Opening ONNX Runtime sessions: threads, providers, and what became of the wish for a GPU."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from aiorch_backends.common import import_framework, is_set, refuse, require_artefact
from aiorch_server.backend import LoadContext

try:
    from aiorch_backends.onnxruntime import native
except ImportError:  # not compiled here: the Python API serves everything
    native = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

#: Name in the configuration: name in the Python API, number in the C API.
_LEVELS = {
    "disable": ("ORT_DISABLE_ALL", 0),
    "basic": ("ORT_ENABLE_BASIC", 1),
    "extended": ("ORT_ENABLE_EXTENDED", 2),
    "all": ("ORT_ENABLE_ALL", 99),
}
# A spinning pool burns the cores that other instances and the server's own threads live on.
_ENTRIES = {"session.intra_op.allow_spinning": "0"}
# Errors come back as such; written to stderr too, clients could fill the log with them.
_FATAL_ONLY = 4
_MOST_THREADS = 1024


def open_session(context: LoadContext) -> Any:
    """A ``NativeSession`` where the C API carries the model, else an ``onnxruntime.InferenceSession``.

    The C API needs no interpreter to run a batch; it is used on the CPU, for tensors of types with a fixed item size.
    ModelLoadError names the file.
    """
    return _open_native(context) or _open_python(context)


def is_native(session: Any) -> bool:
    """Whether ``open_session`` opened it over the C API."""
    return native is not None and isinstance(session, native.NativeSession)


def _open_native(context: LoadContext) -> Any:
    library = _find_library()
    if native is None or library is None or context.device != "cpu":
        return None
    path = require_artefact(context)
    threads, level = _read_threads(context), _read_level(context)[1]
    try:
        return native.NativeSession(str(library), str(path), threads=threads, optimization=level, entries=_ENTRIES)
    except TypeError:  # strings, sequences, maps: the Python API carries more
        return None
    except OSError as error:
        logger.warning("ONNX Runtime's C API cannot be used, its Python API is: %s", error)
        return None
    except RuntimeError as error:
        raise refuse(context, error) from error


def _find_library() -> Path | None:
    """The shared library in the installed package, which is not imported for that; None where there is none."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted((Path(spec.origin).parent / "capi").glob("libonnxruntime.so*"))), None)


def _open_python(context: LoadContext) -> Any:
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
    for key, value in _ENTRIES.items():
        options.add_session_config_entry(key, value)
    options.log_severity_level = _FATAL_ONLY
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, _read_level(context)[0])
    return options


def _read_level(context: LoadContext) -> tuple[str, int]:
    level = context.parameters.get("graph_optimization_level", "all").lower()
    if level not in _LEVELS:
        raise refuse(
            context, f"parameter 'graph_optimization_level' must be one of {', '.join(_LEVELS)}, not '{level}'"
        )
    return _LEVELS[level]


def _read_threads(context: LoadContext) -> int:
    text = context.parameters.get("intra_op_thread_count", str(context.threads))
    if not text.isdecimal() or not 0 < int(text) <= _MOST_THREADS:
        raise refuse(context, f"parameter 'intra_op_thread_count' must be from 1 to {_MOST_THREADS}, not '{text}'")
    return int(text)
