"""The schemas of the REST door's documents, as OpenAPI's components (JSON Schema 2020-12)."""

from __future__ import annotations

from typing import Any, Final

from aiorch_server.types import DataType

Schema = dict[str, Any]

_TEXT: Final[Schema] = {"type": "string"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}


def refer(name: str) -> Schema:
    """A reference to a schema."""
    return {"$ref": f"#/components/schemas/{name}"}


def _describe_object(required: str = "", *, more: Any = True, about: str = "", **properties: Schema) -> Schema:
    """An object with ``properties``, of which those named in ``required`` must be there."""
    schema: Schema = {"type": "object", "properties": properties, "additionalProperties": more}
    if required:
        schema["required"] = required.split()
    if about:
        schema["description"] = about
    return schema


def _list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_DATATYPES: Final = [member.value for member in DataType]
_SHAPE: Final = _list_of({"type": "integer"})
_DURATION: Final = refer("Duration")
_SIGNATURE_NAME: Final = {"type": "string", "default": "serving_default"}

SCHEMAS: Final[dict[str, Schema]] = {
    "Error": _describe_object("error", more=False, error=_TEXT),
    "Parameters": {
        "type": "object",
        "additionalProperties": {"type": ["boolean", "number", "string"]},
        "maxProperties": 1024,
    },
    "Datatype": {"type": "string", "enum": _DATATYPES},
    "Data": {
        "type": "array",
        "description": "Elements in row-major order, nested like the shape or flat; none for FP16 and BF16.",
        "items": {},
    },
    "Duration": _describe_object("count ns", more=False, count=_COUNT, ns=_COUNT),
    "ServerMetadata": _describe_object(
        "name version extensions", name=_TEXT, version=_TEXT, extensions=_list_of(_TEXT)
    ),
    "TensorMetadata": _describe_object(
        "name datatype shape", more=False, name=_TEXT, datatype=refer("Datatype"), shape=_SHAPE
    ),
    "ModelMetadata": _describe_object(
        "name versions platform inputs outputs",
        name=_TEXT,
        versions=_list_of(_TEXT),
        platform=_TEXT,
        inputs=_list_of(refer("TensorMetadata")),
        outputs=_list_of(refer("TensorMetadata")),
    ),
    "ModelConfig": _describe_object(
        "name", about="The completed config.pbtxt; keys are those of ModelConfig in model_config.proto.", name=_TEXT
    ),
    "ModelStatistics": _describe_object(
        "model_stats",
        model_stats=_list_of(
            _describe_object(
                "name version last_inference inference_count execution_count inference_stats batch_stats",
                name=_TEXT,
                version=_TEXT,
                last_inference=_COUNT,
                inference_count=_COUNT,
                execution_count=_COUNT,
                inference_stats={"type": "object", "additionalProperties": _DURATION},
                response_stats={
                    "type": "object",
                    "additionalProperties": {"type": "object", "additionalProperties": _DURATION},
                },
                batch_stats=_list_of(
                    _describe_object(
                        "batch_size",
                        batch_size=_COUNT,
                        compute_input=_DURATION,
                        compute_infer=_DURATION,
                        compute_output=_DURATION,
                    )
                ),
            )
        ),
    ),
    "InferRequest": _describe_object(
        "inputs",
        id=_TEXT,
        parameters=refer("Parameters"),
        inputs=_list_of(
            _describe_object(
                "name datatype shape",
                about="With data, or parameters.binary_data_size, or parameters.shared_memory_region.",
                name=_TEXT,
                datatype=refer("Datatype"),
                shape=_SHAPE,
                parameters=refer("Parameters"),
                data=refer("Data"),
            )
        ),
        outputs=_list_of(_describe_object("name", name=_TEXT, parameters=refer("Parameters"))),
    ),
    "InferResponse": _describe_object(
        "model_name model_version outputs",
        id=_TEXT,
        model_name=_TEXT,
        model_version=_TEXT,
        parameters=refer("Parameters"),
        outputs=_list_of(
            _describe_object(
                "name datatype shape",
                name=_TEXT,
                datatype=refer("Datatype"),
                shape=_SHAPE,
                parameters=refer("Parameters"),
                data=refer("Data"),
            )
        ),
    ),
    "GenerateRequest": _describe_object(
        about="Members named like inputs are tensors (a value or a flat array), the others are parameters.",
        id=_TEXT,
        parameters={"type": "object"},
    ),
    "GenerateResponse": _describe_object(
        "model_name model_version",
        about="Each output by its name: one element as a value, more as a flat array.",
        id=_TEXT,
        model_name=_TEXT,
        model_version=_TEXT,
    ),
    "IndexRequest": _describe_object(ready={"type": "boolean", "default": False}),
    "RepositoryIndex": _list_of(
        _describe_object(
            "name",
            more=False,
            name=_TEXT,
            version=_TEXT,
            state={"type": "string", "enum": ["UNKNOWN", "READY", "UNAVAILABLE", "LOADING", "UNLOADING"]},
            reason=_TEXT,
        )
    ),
    "LoadRequest": _describe_object(
        parameters={
            "type": "object",
            "properties": {"config": {"type": "string", "description": "The configuration as JSON."}},
            "patternProperties": {"^file:": {"type": "string", "contentEncoding": "base64"}},
            "additionalProperties": False,
        }
    ),
    "UnloadRequest": _describe_object(
        parameters=_describe_object(unload_dependents={"type": "boolean", "default": False})
    ),
    "SystemRegion": _describe_object("key byte_size", key=_TEXT, offset={**_COUNT, "default": 0}, byte_size=_COUNT),
    "SystemRegions": _list_of(
        _describe_object("name key offset byte_size", name=_TEXT, key=_TEXT, offset=_COUNT, byte_size=_COUNT)
    ),
    "CudaRegion": _describe_object(about="Refused: this server has no CUDA shared memory."),
    "CudaRegions": {"type": "array", "maxItems": 0},
    "TraceChange": {"type": "object", "additionalProperties": {"type": ["string", "array", "null"], "items": _TEXT}},
    "TraceSetting": {"type": "object", "additionalProperties": {"type": ["string", "array"], "items": _TEXT}},
    "LogChange": {"type": "object", "additionalProperties": {"type": ["boolean", "integer", "string", "null"]}},
    "LogSettings": {"type": "object", "additionalProperties": {"type": ["boolean", "integer", "string"]}},
    "PredictRequest": {
        **_describe_object(signature_name=_SIGNATURE_NAME, instances={"type": "array"}, inputs={}),
        "oneOf": [{"required": ["instances"]}, {"required": ["inputs"]}],
    },
    "PredictResponse": {
        **_describe_object(predictions={"type": "array"}, outputs={}),
        "oneOf": [{"required": ["predictions"]}, {"required": ["outputs"]}],
    },
    "ExamplesRequest": _describe_object(
        "examples",
        signature_name=_SIGNATURE_NAME,
        context={"type": "object"},
        examples={"type": "array", "minItems": 1, "items": {"type": "object"}},
    ),
    "ClassifyResponse": _describe_object("results", results=_list_of({"type": "array"})),
    "RegressResponse": _describe_object("results", results=_list_of({"type": "number"})),
    "ServingStatus": _describe_object(
        "model_version_status",
        model_version_status=_list_of(_describe_object("version state", version=_TEXT, state=_TEXT)),
    ),
    "ServingMetadata": _describe_object(
        "model_spec metadata", model_spec={"type": "object"}, metadata={"type": "object"}
    ),
}
