"""GET /openapi.json: what the REST door serves, in OpenAPI 3.1, made from one table; imported with its first reader.

The tests compare the table with the routers in both directions, and send its examples to a running server.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any, Final

from aiorch_server import __version__
from aiorch_server.frontends.rest.openapi_operations import EXAMPLE_MODEL, OPERATIONS, Operation
from aiorch_server.frontends.rest.openapi_schemas import SCHEMAS, refer

#: What each status tells; bodies are the schema Error.
_FAILURES: Final = {
    400: "The request is wrong; the text says what and where.",
    403: "The server's operator asks for a header that is missing or wrong.",
    404: "No such model, version or path.",
    408: "The body stood still, or came too slowly.",
    409: "The request was given up.",
    413: "The body, or its JSON, is over the server's limit.",
    429: "A queue or the memory for bodies is full; try again later.",
    500: "The model or the server failed.",
    501: "The server does not do this.",
    503: "The model or the server is not ready, or stopping.",
    504: "The request's timeout has passed.",
}
_PARAMETERS: Final[dict[str, dict[str, Any]]] = {
    "model": {"schema": {"type": "string"}, "example": EXAMPLE_MODEL},
    "version": {"schema": {"type": "string", "pattern": "^[0-9]+$"}, "example": "1"},
    "label": {"schema": {"type": "string"}, "example": "stable"},
    "region": {"schema": {"type": "string"}, "example": "example_region"},
    "repository": {"schema": {"type": "string"}, "example": "main"},
}


@cache
def render_openapi() -> bytes:
    """The document as JSON."""
    return json.dumps(build_openapi(), separators=(",", ":")).encode("ascii")


def build_openapi() -> dict[str, Any]:
    """The document; paths are in the order in which their examples make sense."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        for path in operation.paths:
            item = paths.setdefault(path, {})
            if names := re.findall(r"{(\w+)}", path):
                item["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in names]
            if operation.tag == "metrics":
                variables = {"host": {"default": "127.0.0.1"}, "port": {"default": "8002"}}
                item["servers"] = [{"url": "http://{host}:{port}", "variables": variables}]
            item[operation.method.lower()] = _show_operation(operation, path)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "AIOrchestrator",
            "version": __version__,
            "description": "The V2 inference protocol with Triton's extensions, and TensorFlow Serving's REST API. "
            "Other methods than these get 405, but 400 under /v1; bodies may be packed with gzip or deflate.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": SCHEMAS,
            "parameters": {
                name: {"name": name, "in": "path", "required": True, **more} for name, more in _PARAMETERS.items()
            },
            "responses": {
                str(status): {"description": text, "content": {"application/json": {"schema": refer("Error")}}}
                for status, text in _FAILURES.items()
            },
        },
    }


def _show_operation(operation: Operation, path: str) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": operation.method.lower() + "_" + re.sub(r"\W+", "_", path).strip("_"),
        "responses": _show_responses(operation),
        "security": [],
    }
    if operation.body:
        content: dict[str, Any] = {"schema": refer(operation.body)}
        if operation.example is not None:
            content["example"] = operation.example
        media = {"application/json": content}
        if operation.body == "InferRequest":
            media["application/octet-stream"] = {"schema": {}}
            length = {"type": "integer", "minimum": 1}
            shown["parameters"] = [{"name": "Inference-Header-Content-Length", "in": "header", "schema": length}]
        shown["requestBody"] = {"required": operation.is_body_required, "content": media}
    return shown


def _show_responses(operation: Operation) -> dict[str, Any]:
    success: dict[str, Any] = {"description": "Done."}
    if operation.answer in SCHEMAS:
        content: dict[str, Any] = {"schema": refer(operation.answer)}
        if operation.answer_example is not None:
            content["example"] = operation.answer_example
        success["content"] = {"application/json": content}
        if operation.answer == "InferResponse":
            success["content"]["application/octet-stream"] = {"schema": {}}
    elif operation.answer:
        success["content"] = {operation.answer: {"schema": {}}}
    # Any group of calls can be restricted, but for the metrics, which have a port of their own.
    told = operation.failures if operation.tag == "metrics" else sorted({403, *operation.failures})
    failures = {str(status): {"$ref": f"#/components/responses/{status}"} for status in told}
    is_refused = operation.failures == (501,)
    return failures if is_refused else {"200": success, **failures}
