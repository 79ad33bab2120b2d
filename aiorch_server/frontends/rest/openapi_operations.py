"""What the REST door serves, as one table; the order is that in which the examples make sense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

#: What the examples speak of: FP32 ``x`` [1], ``y`` [1] = x / 2 + 2, batches.
EXAMPLE_MODEL: Final = "half_plus_two"
_M: Final = "/v2/models/{model}"
_V: Final = _M + "/versions/{version}"
_R: Final = "/v2/repository"
_S: Final = "/v2/systemsharedmemory"
_C: Final = "/v2/cudasharedmemory"
_TARGETS: Final = tuple(f"/v1/models/{{model}}{which}" for which in ("", "/versions/{version}", "/labels/{label}"))
_INPUT: Final = {"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [4.0]}
_OUTPUT: Final = {"name": "y", "datatype": "FP32", "shape": [1, 1], "data": [4.0]}
_ANSWER: Final = {"model_name": EXAMPLE_MODEL, "model_version": "1"}

_READ: Final = (400, 404, 500)
_WRITTEN: Final = (400, 404, 408, 413, 429, 500, 501, 503)
_CALLED: Final = (400, 404, 408, 409, 413, 429, 500, 501, 503, 504)


@dataclass(frozen=True, slots=True)
class Operation:
    """What one method does at some paths; ``answer`` names a schema, or is a media type without one, or empty."""

    tag: str
    method: str
    paths: tuple[str, ...]
    summary: str
    answer: str = ""
    body: str = ""
    failures: tuple[int, ...] = _READ
    example: Any = None
    answer_example: Any = None
    is_body_required: bool = False


def _list_calls(name: str, summary: str, body: str, answer: str, example: Any, answer_example: Any) -> Operation:
    paths = tuple(f"{target}:{name}" for target in _TARGETS)
    return Operation("tfserving", "POST", paths, summary, answer, body, _CALLED, example, answer_example, True)


OPERATIONS: Final = (
    Operation("server", "GET", ("/openapi.json",), "This document.", "application/json", failures=()),
    Operation("server", "GET", ("/v2",), "Name, version and extensions of the server.", "ServerMetadata"),
    Operation("server", "GET", ("/v2/health/live",), "Whether the server lives: 200, else 400."),
    Operation("server", "GET", ("/v2/health/ready",), "Whether requests can be sent: 200, else 400."),
    Operation("models", "GET", (f"{_M}/ready", f"{_V}/ready"), "Whether the model is ready: 200, else 400."),
    Operation("models", "GET", (_M, _V), "Inputs and outputs of a model.", "ModelMetadata"),
    Operation("models", "GET", (f"{_M}/config", f"{_V}/config"), "The completed configuration.", "ModelConfig"),
    Operation(
        "models",
        "GET",
        ("/v2/models/stats", f"{_M}/stats", f"{_V}/stats"),
        "Counts and durations since the model was loaded.",
        "ModelStatistics",
    ),
    Operation(
        "inference",
        "POST",
        (f"{_M}/infer", f"{_V}/infer"),
        "One inference. Tensors as JSON, or as bytes after the JSON (Inference-Header-Content-Length).",
        "InferResponse",
        "InferRequest",
        _CALLED,
        {"id": "one", "inputs": [_INPUT]},
        {"id": "one", **_ANSWER, "outputs": [_OUTPUT]},
        True,
    ),
    Operation(
        "inference",
        "POST",
        (f"{_M}/generate", f"{_V}/generate"),
        "One inference with flat JSON, for models that give one answer.",
        "GenerateResponse",
        "GenerateRequest",
        _CALLED,
        {"x": 4.0},
        {**_ANSWER, "y": 4.0},
        True,
    ),
    Operation(
        "inference",
        "POST",
        (f"{_M}/generate_stream", f"{_V}/generate_stream"),
        "As generate, with a server-sent event for each answer; later errors are events too.",
        "text/event-stream",
        "GenerateRequest",
        _CALLED,
        {"x": 4.0},
        is_body_required=True,
    ),
    Operation(
        "shared memory",
        "POST",
        (f"{_S}/region/{{region}}/register",),
        "Makes a region known.",
        "",
        "SystemRegion",
        _WRITTEN,
        {"key": "/aiorch_example", "byte_size": 64},
        None,
        True,
    ),
    Operation(
        "shared memory", "GET", (f"{_S}/status", f"{_S}/region/{{region}}/status"), "Known regions.", "SystemRegions"
    ),
    Operation(
        "shared memory", "POST", (f"{_S}/region/{{region}}/unregister", f"{_S}/unregister"), "Forgets a region, or all."
    ),
    Operation("shared memory", "POST", (f"{_C}/region/{{region}}/register",), "Refused.", "", "CudaRegion", _WRITTEN),
    Operation(
        "shared memory",
        "GET",
        (f"{_C}/status", f"{_C}/region/{{region}}/status"),
        "CUDA regions: none.",
        "CudaRegions",
        failures=(*_READ, 503),
    ),
    Operation("shared memory", "POST", (f"{_C}/region/{{region}}/unregister", f"{_C}/unregister"), "Does nothing."),
    Operation("settings", "GET", ("/v2/trace/setting", f"{_M}/trace/setting"), "What is traced.", "TraceSetting"),
    Operation(
        "settings",
        "POST",
        ("/v2/trace/setting", f"{_M}/trace/setting"),
        "Changes what is traced; null resets.",
        "TraceSetting",
        "TraceChange",
        _WRITTEN,
        {"trace_rate": "1000"},
    ),
    Operation("settings", "GET", ("/v2/logging",), "What is logged.", "LogSettings"),
    Operation(
        "settings",
        "POST",
        ("/v2/logging",),
        "Changes what is logged.",
        "LogSettings",
        "LogChange",
        _WRITTEN,
        {"log_verbose_level": 0},
    ),
    Operation(
        "repository",
        "POST",
        (f"{_R}/index", f"{_R}/{{repository}}/index"),
        "The models, and their states.",
        "RepositoryIndex",
        "IndexRequest",
        _WRITTEN,
        {"ready": True},
    ),
    Operation(
        "repository",
        "POST",
        (f"{_R}/models/{{model}}/load",),
        "Loads or reloads a model.",
        "",
        "LoadRequest",
        _WRITTEN,
        {"parameters": {}},
    ),
    Operation("tfserving", "GET", _TARGETS, "Versions and their states.", "ServingStatus"),
    Operation(
        "tfserving", "GET", tuple(f"{each}/metadata" for each in _TARGETS), "The model's signature.", "ServingMetadata"
    ),
    _list_calls(
        "predict",
        "One inference, by rows (instances) or columns (inputs).",
        "PredictRequest",
        "PredictResponse",
        {"instances": [[1.0], [2.0]]},
        {"predictions": [[2.5], [3.0]]},
    ),
    _list_calls(
        "classify", "Classes with scores, for models that give them.", "ExamplesRequest", "ClassifyResponse", None, None
    ),
    _list_calls(
        "regress",
        "A value for each example.",
        "ExamplesRequest",
        "RegressResponse",
        {"examples": [{"x": 1.0}, {"x": 2.0}]},
        {"results": [2.5, 3.0]},
    ),
    Operation(
        "repository",
        "POST",
        (f"{_R}/models/{{model}}/unload",),
        "Unloads a model.",
        "",
        "UnloadRequest",
        _WRITTEN,
        {"parameters": {"unload_dependents": False}},
    ),
    Operation(
        "repository",
        "POST",
        tuple(f"{_R}/{{repository}}/models/{{model}}/{verb}" for verb in ("load", "unload")),
        "Refused: there are no named repositories.",
        failures=(501,),
    ),
    Operation("metrics", "GET", ("/metrics",), "For Prometheus, on a port of its own.", "text/plain", failures=(500,)),
)
