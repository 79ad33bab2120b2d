"""Values of the control plane as the JSON documents of the V2 protocol and its extensions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from aiorch_server.types import (
    Duration,
    ModelIndexEntry,
    ModelMetadata,
    ModelState,
    ModelStatistics,
    ServerMetadata,
    TensorMetadata,
)

Document = dict[str, Any]


def write_json(document: object) -> Response:
    """The response that carries ``document``, without a body for None."""
    body = b"" if document is None else json.dumps(document, separators=(",", ":")).encode("ascii")
    return Response(body, media_type="application/json")


def show_server(metadata: ServerMetadata) -> Document:
    """The answer of GET /v2."""
    return {"name": metadata.name, "version": metadata.version, "extensions": list(metadata.extensions)}


def show_model(metadata: ModelMetadata) -> Document:
    """The answer of GET /v2/models/{model}."""
    return {
        "name": metadata.name,
        "versions": list(metadata.versions),
        "platform": metadata.platform,
        "inputs": [_show_tensor(tensor) for tensor in metadata.inputs],
        "outputs": [_show_tensor(tensor) for tensor in metadata.outputs],
    }


def show_index(entries: Sequence[ModelIndexEntry]) -> list[Document]:
    """The answer of POST /v2/repository/index; fields without a value are left out, as Triton does."""
    return [_show_entry(entry) for entry in entries]


def show_statistics(statistics: Sequence[ModelStatistics]) -> Document:
    """The answer of GET .../stats (statistics extension)."""
    return {"model_stats": [_show_model_statistics(model) for model in statistics]}


def _show_tensor(tensor: TensorMetadata) -> Document:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def _show_entry(entry: ModelIndexEntry) -> Document:
    document: Document = {"name": entry.name}
    if entry.version:
        document["version"] = entry.version
    if entry.version or entry.state is not ModelState.UNKNOWN:
        document["state"] = entry.state.value
    if entry.reason:
        document["reason"] = entry.reason
    return document


def _show_model_statistics(model: ModelStatistics) -> Document:
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": model.last_inference_ms,
        "inference_count": model.inference_count,
        "execution_count": model.execution_count,
        "inference_stats": {
            "success": _show_duration(model.success),
            "fail": _show_duration(model.fail),
            "queue": _show_duration(model.queue),
            "compute_input": _show_duration(model.compute_input),
            "compute_infer": _show_duration(model.compute_infer),
            "compute_output": _show_duration(model.compute_output),
            "cache_hit": _show_duration(model.cache_hit),
            "cache_miss": _show_duration(model.cache_miss),
        },
        "response_stats": {
            place: {each.name: _show_duration(getattr(responses, each.name)) for each in dataclasses.fields(responses)}
            for place, responses in model.responses.items()
        },
        "batch_stats": [
            {
                "batch_size": batch.batch_size,
                "compute_input": _show_duration(batch.compute_input),
                "compute_infer": _show_duration(batch.compute_infer),
                "compute_output": _show_duration(batch.compute_output),
            }
            for batch in model.batches
        ],
        "memory_usage": [],
    }


def _show_duration(duration: Duration) -> Document:
    return {"count": duration.count, "ns": duration.ns}
