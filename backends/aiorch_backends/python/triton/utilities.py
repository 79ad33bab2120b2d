"""The module that a model imports as ``triton_python_backend_utils``: one for each import of a model's file."""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final, NoReturn

from aiorch_backends.python.triton import calls, messages, metrics, model_config, tensors
from aiorch_backends.python.triton.failures import TritonError, TritonModelException
from aiorch_server.backend import LoadContext
from aiorch_server.types import DataType

#: What it is called in models.
UTILITIES: Final = "triton_python_backend_utils"


class LogLevel(enum.IntEnum):
    """Levels of ``Logger.log``."""

    INFO = 0
    WARNING = 1
    ERROR = 2
    VERBOSE = 3


_LEVELS: Final = {
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
    LogLevel.VERBOSE: logging.DEBUG,
}
#: Of one line in the log: a model may log what its clients send.
_MAX_CHARACTERS: Final = 8192


def make_utilities(context: LoadContext) -> ModuleType:
    """A module of that name, bound to the server and the model behind ``context``."""
    module = ModuleType(UTILITIES, "What models written for Triton's python backend import.")
    request = type("InferenceRequest", (calls.InferenceRequest,), {"_call_model": _as_static(context.call_model)})
    family = type("MetricFamily", (metrics.MetricFamily,), {"_declare": _as_static(context.declare_metric)})
    contents: dict[str, Any] = {
        "InferenceRequest": request,
        "InferenceResponse": messages.InferenceResponse,
        "InferenceTrace": messages.InferenceTrace,
        "Logger": _make_logger(context),
        "LogLevel": LogLevel,
        "Metric": metrics.Metric,
        "MetricFamily": family,
        "MetricKind": metrics.MetricKind,
        "ModelConfig": model_config.ModelConfig,
        "PreferredMemory": messages.PreferredMemory,
        "Tensor": tensors.Tensor,
        "TritonError": TritonError,
        "TritonModelException": TritonModelException,
        "TRITONSERVER_MEMORY_CPU": 0,
        "TRITONSERVER_MEMORY_GPU": 2,
        "TRITONSERVER_REQUEST_FLAG_SEQUENCE_START": messages.REQUEST_FLAG_SEQUENCE_START,
        "TRITONSERVER_REQUEST_FLAG_SEQUENCE_END": messages.REQUEST_FLAG_SEQUENCE_END,
        "TRITONSERVER_REQUEST_RELEASE_ALL": messages.REQUEST_RELEASE_ALL,
        "TRITONSERVER_REQUEST_RELEASE_RESCHEDULE": messages.REQUEST_RELEASE_RESCHEDULE,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": messages.RESPONSE_COMPLETE_FINAL,
        "TRITON_STRING_TO_NUMPY": _list_numpy_types(),
        "deserialize_bytes_tensor": tensors.deserialize_bytes_tensor,
        "get_input_config_by_name": model_config.get_input_config_by_name,
        "get_input_tensor_by_name": get_input_tensor_by_name,
        "get_model_dir": lambda: str(context.artefact.parent),
        "get_output_config_by_name": model_config.get_output_config_by_name,
        "get_output_tensor_by_name": get_output_tensor_by_name,
        "is_model_ready": _refuse_control,
        "load_model": _refuse_control,
        "numpy_to_triton_type": tensors.numpy_to_triton_type,
        "serialize_byte_tensor": tensors.serialize_byte_tensor,
        "triton_string_to_numpy": tensors.triton_string_to_numpy,
        "triton_to_numpy_type": tensors.triton_to_numpy_type,
        "unload_model": _refuse_control,
        "using_decoupled_model_transaction_policy": model_config.using_decoupled_model_transaction_policy,
    }
    vars(module).update(contents)
    return module


def get_input_tensor_by_name(inference_request: messages.InferenceRequest, name: str) -> tensors.Tensor | None:
    """The request's tensor of that name, None if it has none."""
    return next((tensor for tensor in inference_request.inputs() if tensor.name() == name), None)


def get_output_tensor_by_name(inference_response: messages.InferenceResponse, name: str) -> tensors.Tensor | None:
    """The answer's tensor of that name, None if it has none."""
    return next((tensor for tensor in inference_response.output_tensors() if tensor.name() == name), None)


def _as_static(function: Any) -> Any:
    return None if function is None else staticmethod(function)


def _list_numpy_types() -> Mapping[str, Any]:
    names = [member.config_name for member in DataType if member is not DataType.BF16]
    return {name: tensors.triton_string_to_numpy(name) for name in names}


def _refuse_control(*_: Any, **__: Any) -> NoReturn:
    raise TritonModelException("Models cannot load, unload or look at other models of this server, only call them.")


def _make_logger(context: LoadContext) -> type:
    logger = logging.getLogger(f"aiorch.model.{context.model_name}")

    def write(message: str, level: LogLevel = LogLevel.INFO) -> None:
        text = str(message)
        logger.log(
            _LEVELS[LogLevel(level)], "%s", text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}..."
        )

    class Logger:
        """Writes to the server's log."""

        INFO, WARNING, ERROR, VERBOSE = LogLevel
        log = staticmethod(write)
        log_info = staticmethod(lambda message: write(message, LogLevel.INFO))
        log_warn = staticmethod(lambda message: write(message, LogLevel.WARNING))
        log_error = staticmethod(lambda message: write(message, LogLevel.ERROR))
        log_verbose = staticmethod(lambda message: write(message, LogLevel.VERBOSE))

    return Logger
