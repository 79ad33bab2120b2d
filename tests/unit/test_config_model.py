"""ModelConfig: everything wrong is told at once with its path, nothing is ignored, and what is served reads back."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from aiorch_proto.v2 import model_config_pb2
from google.protobuf import json_format
from pydantic import ValidationError

from aiorch_server.config import support
from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import ModelLoadError
from aiorch_server.types import DataType, ModelSignature, TensorSpec

INPUT = {"name": "x", "data_type": "TYPE_FP32", "dims": [4]}
OUTPUT = {"name": "y", "data_type": "TYPE_STRING", "dims": [-1]}


def problems_of(data: dict[str, Any], folder: str = "m") -> str:
    with pytest.raises(ModelLoadError) as caught:
        ModelConfig.from_dict(data, folder=folder)
    return str(caught.value)


def test_all_problems_are_told_at_once_with_their_paths() -> None:
    text = problems_of(
        {
            "name": "other",
            "maxBatchSize": 3,
            "max_batch_size": -1,
            "input": [{"nam": "x", "dims": [0, "a"]}],
            "dynamic_batching": {"priority_levels": 2},
            "instance_group": [{"count": 0}, {"kind": "KIND_CPU", "gpus": [0]}],
            "sequence_batching": {"iterative_sequence": True},
        }
    )
    for expected in (
        "invalid configuration of model 'm': ",
        "name: found 'other'; it must equal the model's folder name 'm'",
        "maxBatchSize: unknown key; did you mean 'max_batch_size'?",
        "max_batch_size: found -1; should be greater than or equal to 0",
        "input[0].name: is missing",
        "input[0].data_type: is missing",
        "input[0].nam: unknown key; did you mean 'name'?",
        "input[0].dims[0]: found 0; should be greater than 0, or -1",
        "input[0].dims[1]: found 'a'; should be a valid integer",
        "dynamic_batching.default_priority_level: found 0; with priority_levels 2 it must be between 1 and 2",
        "instance_group[0].count: found 0",
        "instance_group[1].gpus: found [0]; KIND_CPU takes no gpus",
        "sequence_batching.iterative_sequence: not supported",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"input": [{**INPUT, "data_type": "TYPE_FP31"}]}, "input[0].data_type: found 'TYPE_FP31'; should be one of"),
        ({"input": [{**INPUT, "data_type": "TYPE_INVALID"}]}, "input[0].data_type"),
        ({"input": [{**INPUT, "dims": [-2]}]}, "input[0].dims[0]: found -2"),
        ({"input": [{**INPUT, "dims": [True]}]}, "input[0].dims[0]: found True; should be a number"),
        ({"input": [INPUT, INPUT]}, "input[1].name: found 'x' for the second time"),
        ({"output": [OUTPUT, OUTPUT]}, "output[1].name"),
        ({"input": "x"}, "input: found 'x'"),
        ({"output": [{**OUTPUT, "label_filename": "../labels"}]}, "output[0].label_filename"),
        ({"default_model_filename": "../../etc/passwd"}, "default_model_filename"),
        ({"max_batch_size": 0, "dynamic_batching": {}}, "dynamic_batching: needs max_batch_size above 0"),
        (
            {"max_batch_size": 4, "dynamic_batching": {"preferred_batch_size": [4, 8]}},
            "dynamic_batching.preferred_batch_size[1]: found 8; it must be at most max_batch_size, which is 4",
        ),
        ({"dynamic_batching": {"preferred_batch_size": [0]}}, "preferred_batch_size[0]: found 0"),
        ({"dynamic_batching": {"default_priority_level": 1}}, "it needs priority_levels above 0"),
        (
            {"dynamic_batching": {"priority_levels": 1, "default_priority_level": 2}},
            "dynamic_batching.default_priority_level: found 2",
        ),
        (
            {"dynamic_batching": {"preserve_ordering": True, "priority_levels": 2, "default_priority_level": 1}},
            "dynamic_batching.preserve_ordering: found true with 2 priority_levels",
        ),
        (
            {"dynamic_batching": {"preserve_ordering": True, "default_queue_policy": {"timeout_action": "DELAY"}}},
            "dynamic_batching.preserve_ordering: found true with timeout_action DELAY",
        ),
        (
            {
                "max_batch_size": 4,
                "dynamic_batching": {"preserve_ordering": True},
                "model_transaction_policy": {"decoupled": True},
            },
            "dynamic_batching.preserve_ordering: found true with model_transaction_policy.decoupled",
        ),
        (
            {
                "dynamic_batching": {
                    "priority_levels": 1,
                    "default_priority_level": 1,
                    "priority_queue_policy": {"2": {}},
                }
            },
            "found level 2; priority_levels is 1",
        ),
        *(
            ({"max_batch_size": 2, "input": [{**INPUT, "dims": dims, "reshape": {"shape": shape}}]}, f"found {shape}")
            for dims, shape in (
                ([4], [2]),
                ([4], [-1]),
                ([-1, 4], [4, -1]),
                ([-1, -1], [-1]),
                ([4], []),
                ([2, -1, 3], [6, -1]),
            )
        ),
        (
            {"max_batch_size": 0, "output": [{**OUTPUT, "dims": [1], "reshape": {}}]},
            "output[0].reshape.shape: found []",
        ),
        ({"input": [{**INPUT, "reshape": {"shape": [2, 0]}}]}, "input[0].reshape.shape[1]: found 0"),
        ({"dynamic_batching": {"max_queue_delay_microseconds": -1}}, "max_queue_delay_microseconds: found -1"),
        ({"dynamic_batching": {"max_queue_delay_microseconds": 2**62}}, "max_queue_delay_microseconds: found"),
        ({"dynamic_batching": {}, "sequence_batching": {}}, "only one scheduler"),
        ({"version_policy": {}}, "version_policy: found nothing; exactly one of"),
        ({"version_policy": {"latest": {}, "all": {}}}, "version_policy: found latest and all"),
        ({"version_policy": {"latest": {"num_versions": 0}}}, "version_policy.latest.num_versions: found 0"),
        ({"version_policy": {"specific": {"versions": []}}}, "version_policy.specific.versions"),
        ({"version_policy": {"specific": {"versions": [0]}}}, "version_policy.specific.versions[0]: found 0"),
        ({"instance_group": [{"gpus": [1, 1]}]}, "instance_group[0].gpus: found [1, 1]"),
        ({"instance_group": [{"count": 10**6}]}, "instance_group[0].count"),
        (
            {"instance_group": [{"rate_limiter": {"priority": 2}}]},
            "instance_group[0].rate_limiter.priority: found 2; it orders instances that share a resource",
        ),
        ({"instance_group": [{"rate_limiter": {"resources": [{"count": 1}]}}]}, "resources[0].name: is missing"),
        ({"instance_group": [{"rate_limiter": {"resources": [{"name": "", "count": 1}]}}]}, "resources[0].name"),
        (
            {"max_batch_size": 2, "model_warmup": [{"name": "w", "batch_size": 3}]},
            "model_warmup[0].batch_size: found 3; it must be at most 2",
        ),
        (
            {"model_warmup": [{"inputs": {"x": {"data_type": "TYPE_FP32", "dims": [1]}}}]},
            "model_warmup[0].inputs.x: found none; exactly one of zero_data",
        ),
        (
            {"model_warmup": [{"inputs": {"x": {"data_type": "TYPE_FP32", "dims": [-1], "zero_data": True}}}]},
            "model_warmup[0].inputs.x.dims: found [-1]",
        ),
        ({"parameters": {"a": [1]}}, "parameters.a: found [1]"),
    ],
)
def test_a_problem_is_named(data: dict[str, Any], expected: str) -> None:
    assert expected in problems_of(data)


def test_rules_between_sections_run_beside_a_wrong_section() -> None:
    text = problems_of({"max_batch_size": 4, "dynamic_batching": {"preferred_batch_size": [9]}, "input": [{}]})
    assert "input[0].name: is missing" in text
    assert "preferred_batch_size[0]: found 9" in text


# What asks for each refused feature; a line that leaves the table must leave here too.
ASKING: dict[str, dict[str, Any]] = {
    "sequence_batching.iterative_sequence": {"sequence_batching": {"iterative_sequence": True}},
    "model_repository_agents.agents": {"model_repository_agents": {"agents": [{"name": "a"}]}},
    "model_operations.op_library_filename": {"model_operations": {"op_library_filename": ["a.so"]}},
    "cc_model_filenames": {"cc_model_filenames": {"8.0": "m.plan"}},
    "runtime": {"runtime": "x"},
    "input[].is_shape_tensor": {"input": [{**INPUT, "is_shape_tensor": True}]},
    "input[].is_non_linear_format_io": {"input": [{**INPUT, "is_non_linear_format_io": True}]},
    "output[].is_shape_tensor": {"output": [{**OUTPUT, "is_shape_tensor": True}]},
    "output[].is_non_linear_format_io": {"output": [{**OUTPUT, "is_non_linear_format_io": True}]},
    "instance_group[].kind": {"instance_group": [{"kind": "KIND_MODEL"}]},
    "instance_group[].secondary_devices": {"instance_group": [{"secondary_devices": [{"device_id": 1}]}]},
    "instance_group[].profile": {"instance_group": [{"profile": ["a"]}]},
    "instance_group[].passive": {"instance_group": [{"passive": True}]},
    "instance_group[].host_policy": {"instance_group": [{"host_policy": "a"}]},
    "optimization.execution_accelerators": {"optimization": {"execution_accelerators": {}}},
}


@pytest.mark.parametrize("restriction", support.REFUSED, ids=lambda each: each.path)
def test_what_is_not_honoured_fails_the_load(restriction: support.Restriction) -> None:
    text = problems_of(ASKING[restriction.path])
    assert f"not supported: {restriction.reason}" in text
    assert restriction.path.split(".")[-1].split("[")[0] in text


def test_what_asks_for_nothing_is_no_problem() -> None:
    ModelConfig.from_dict(
        {
            "response_cache": {"enable": False},
            "model_transaction_policy": {"decoupled": False},
            "model_operations": {},
            "batch_input": [],
            "runtime": "",
            "input": [{**INPUT, "is_shape_tensor": False}],
            "max_batch_size": 2,
            "dynamic_batching": {"default_queue_policy": {"timeout_action": "REJECT"}, "priority_queue_policy": {}},
        },
        folder="m",
    )


def test_hints_are_accepted_and_noted() -> None:
    config = ModelConfig.from_dict(
        {"metric_tags": {"a": "b"}, "optimization": {"priority": "PRIORITY_MAX", "cuda": {"graphs": True}}}, folder="m"
    )
    assert [note.split(" has no effect")[0] for note in config.notes()] == [
        "metric_tags",
        "optimization.priority",
        "optimization.cuda",
    ]
    assert ModelConfig.from_dict({"optimization": {}}, folder="m").notes() == ()


def test_every_restriction_names_a_field_that_exists() -> None:
    descriptor = model_config_pb2.ModelConfig.DESCRIPTOR
    for restriction in support.REFUSED + support.NO_EFFECT:
        message = descriptor
        for step in restriction.path.replace("[]", "").split("."):
            field = message.fields_by_name[step]
            message = field.message_type


def test_the_models_have_exactly_the_protocols_keys() -> None:
    def compare(section: Any, message: Any, path: str) -> int:
        keys = {field.alias or name for name, field in section.model_fields.items()}
        assert keys == {field.name for field in message.fields}, path
        compared = 1
        for name, field in section.model_fields.items():
            key = field.alias or name
            inner = message.fields_by_name[key].message_type
            if inner is not None and inner.GetOptions().map_entry:
                inner = inner.fields_by_name["value"].message_type
            nested = _section_in(field.annotation)
            assert (nested is None) == (inner is None), f"{path}.{key}"
            if nested is not None:
                compared += compare(nested, inner, f"{path}.{key}")
        return compared

    assert compare(ModelConfig, model_config_pb2.ModelConfig.DESCRIPTOR, "ModelConfig") > 40


def _section_in(annotation: Any) -> Any:
    from aiorch_server.config.problems import _section_in as find

    return find(annotation)


def test_frozen_and_checked_when_built_directly() -> None:
    config = ModelConfig(name="m", max_batch_size=1)
    with pytest.raises(ValidationError):
        config.max_batch_size = 2  # type: ignore[misc]
    with pytest.raises(ValidationError):
        ModelConfig(name="m", cc_model_filenames={"7.0": "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must be a JSON object"),
        ("3", "must be a JSON object"),
        ('{"max_batch_size": 1, "max_batch_size": 2}', "'max_batch_size' is written more than once"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        ('{"name": "../m"}', "name: found '../m'"),
    ],
)
def test_bad_json_is_a_load_error(text: str | bytes, expected: str) -> None:
    with pytest.raises(ModelLoadError, match="configuration of") as caught:
        ModelConfig.from_json(text, folder="m")
    assert expected in str(caught.value)


def test_json_numbers_may_be_strings_and_parameters_plain() -> None:
    config = ModelConfig.from_json(
        '{"max_batch_size": 8, "input": [{"name": "x", "data_type": "TYPE_BF16", "dims": ["3", "-1"]}],'
        ' "parameters": {"a": {"string_value": "1"}, "b": "2", "c": 3, "d": true, "e": 0.5}}',
        folder="m",
    )
    assert config.input[0].dims == (3, -1)
    assert config.input[0].data_type is DataType.BF16
    assert config.to_strings() == {"a": "1", "b": "2", "c": "3", "d": "true", "e": "0.5"}


def test_declared_signature_is_silent_where_the_configuration_is() -> None:
    declared = ModelConfig.from_dict({}, folder="m").declare_signature()
    assert (declared.inputs, declared.outputs, declared.max_batch_size) == ((), (), None)
    config = ModelConfig.from_dict(
        {"max_batch_size": 0, "input": [{**INPUT, "optional": True}], "output": [OUTPUT]}, folder="m"
    )
    declared = config.declare_signature({"y": ("cat", "dog")})
    assert declared.max_batch_size == 0
    assert declared.inputs == (TensorSpec("x", DataType.FP32, (4,), optional=True),)
    assert declared.outputs == (TensorSpec("y", DataType.BYTES, (-1,), labels=("cat", "dog")),)


SIGNATURE = ModelSignature(
    (TensorSpec("x", DataType.FP32, (4,)), TensorSpec("z", DataType.INT64, (), optional=True)),
    (TensorSpec("y", DataType.BYTES, (2,)),),
    16,
)


def test_the_completed_configuration_is_that_of_the_artefact() -> None:
    config = ModelConfig.from_dict(
        {
            "input": [{**INPUT, "dims": [-1], "format": "FORMAT_NONE"}],
            "output": [{**OUTPUT, "label_filename": "labels.txt"}],
            "dynamic_batching": {"max_queue_delay_microseconds": 5},
        },
        folder="m",
    )
    served = config.with_signature(SIGNATURE, "onnxruntime", "onnxruntime_onnx", instances=2)
    assert served.backend == "onnxruntime"
    assert served.platform == "onnxruntime_onnx"
    assert served.max_batch_size == 16
    assert [(each.name, each.dims, each.optional) for each in served.input] == [("x", (4,), False), ("z", (), True)]
    assert served.output[0].label_filename == "labels.txt"
    assert served.output[0].dims == (2,)
    assert [(each.name, each.count, each.kind) for each in served.instance_group] == [("m_0", 2, "KIND_CPU")]
    assert served.version_policy is not None
    assert served.version_policy.latest is not None
    assert served.dynamic_batching == config.dynamic_batching
    assert config.max_batch_size is None


def test_gpus_are_shown_as_they_are_used() -> None:
    """Naming GPUs means KIND_GPU; KIND_GPU without a number means the first, and clients are told so."""
    groups = [{"gpus": [1, 2]}, {"kind": "KIND_GPU"}, {"kind": "KIND_CPU"}, {}]
    served = ModelConfig.from_dict({"instance_group": groups}, folder="m").with_signature(SIGNATURE, "b", "p")
    assert [(each.kind, each.gpus) for each in served.instance_group] == [
        ("KIND_GPU", (1, 2)),
        ("KIND_GPU", (0,)),
        ("KIND_CPU", ()),
        ("KIND_CPU", ()),
    ]


def test_time_does_not_grow_with_the_square_of_a_configuration() -> None:
    keys = ",".join(f'"k{index}": 1' for index in range(100_000))
    started = time.monotonic()
    with pytest.raises(ModelLoadError, match="key 'k99999' is written more than once"):
        ModelConfig.from_json(f'{{{keys}, "k99999": 2}}', folder="m")
    with pytest.raises(ModelLoadError, match=r"k0: unknown key; .*; and more"):
        ModelConfig.from_json(f"{{{keys}}}", folder="m")
    inputs = [{**INPUT, "name": f"x{index}"} for index in range(20_000)]
    with pytest.raises(ModelLoadError, match=r"input\[20000\]\.name: found 'x7' for the second time"):
        ModelConfig.from_dict({"input": [*inputs, inputs[7]]}, folder="m")
    assert time.monotonic() - started < 10


def test_a_configuration_that_contradicts_the_artefact_is_refused() -> None:
    config = ModelConfig.from_dict({"input": [{**INPUT, "name": "q"}], "dynamic_batching": {}}, folder="m")
    with pytest.raises(ModelLoadError, match=r"input\[0\]\.name: found 'q'; the model has x, z"):
        config.with_signature(SIGNATURE, "b", "p")
    config = ModelConfig.from_dict({"dynamic_batching": {}}, folder="m")
    with pytest.raises(ModelLoadError, match="dynamic_batching: needs max_batch_size above 0"):
        config.with_signature(ModelSignature((), (), 0), "b", "p")


def test_what_is_served_goes_through_protobuf_and_back() -> None:
    config = ModelConfig.from_dict(
        {
            "input": [INPUT],
            "max_batch_size": 16,
            "dynamic_batching": {
                "preferred_batch_size": [4, 8],
                "max_queue_delay_microseconds": 100,
                "default_queue_policy": {"max_queue_size": 7},
            },
            "parameters": {"a": "b"},
            "model_warmup": [
                {"name": "w", "batch_size": 1, "inputs": {"x": {"data_type": "TYPE_FP32", "zero_data": True}}}
            ],
        },
        folder="m",
    )
    served = config.with_signature(SIGNATURE, "b", "p")
    message = json_format.ParseDict(served.to_dict(), model_config_pb2.ModelConfig())
    assert message.input[1].data_type == DataType.INT64.number
    assert message.dynamic_batching.default_queue_policy.max_queue_size == 7
    # What tritonclient shows as JSON can be sent back in a load request.
    shown = json_format.MessageToJson(message, preserving_proto_field_name=True)
    assert ModelConfig.from_json(shown, folder="m") == served
    assert ModelConfig.from_json(json.dumps(served.to_dict()), folder="m") == served
