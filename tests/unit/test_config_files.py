"""Configuration files: Triton's text format, YAML, and which of them is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiorch_proto.v2 import model_config_pb2
from google.protobuf import json_format, text_format
from hypothesis import given, settings
from hypothesis import strategies as st

from aiorch_server.config.files import LARGEST_CONFIG_BYTES, load_model_config, read_labels
from aiorch_server.config.model import ModelConfig
from aiorch_server.config.pbtxt import read_pbtxt
from aiorch_server.config.strict_yaml import read_yaml
from aiorch_server.errors import ModelLoadError
from aiorch_server.types import DataType

PBTXT = """
# a comment
name: "m"
backend: 'onnxruntime'
max_batch_size: 8
input [ { name: "x" data_type: TYPE_FP32 dims: [ 3, -1 ] }, { name: "s" data_type: TYPE_STRING dims: 1 } ]
output { name: "y" data_type: TYPE_INT64 dims: [ 1 ] label_filename: "labels.txt" }
version_policy: { specific: { versions: [ 1, 3 ] } }
instance_group [ { count: 2 kind: KIND_CPU } ]
dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
parameters: { key: "a" value: { string_value: "b" } }
parameters [ { key: "c" value { string_value: "d\\n" } } ]
"""
YAML = """
name: m
backend: onnxruntime
max_batch_size: 8
input:
  - {name: x, data_type: TYPE_FP32, dims: [3, -1]}
  - {name: s, data_type: TYPE_STRING, dims: [1]}
output: [{name: y, data_type: TYPE_INT64, dims: [1], label_filename: labels.txt}]
version_policy: {specific: {versions: [1, 3]}}
instance_group: [{count: 2, kind: KIND_CPU}]
dynamic_batching: {preferred_batch_size: [4, 8], max_queue_delay_microseconds: 100}
parameters: {a: b, c: "d\\n"}
"""


def make_model(root: Path, **files: str | bytes) -> Path:
    folder = root / "m"
    folder.mkdir()
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_text_format_and_yaml_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = load_model_config(make_model(tmp_path / "a", config__pbtxt=PBTXT))
    second = load_model_config(make_model(tmp_path / "b", config__yaml=YAML))
    assert first == second
    assert first.input[1].data_type is DataType.BYTES
    assert first.to_strings() == {"a": "b", "c": "d\n"}


def test_no_file_is_an_empty_configuration_with_the_folders_name(tmp_path: Path) -> None:
    assert load_model_config(make_model(tmp_path)) == ModelConfig(name="m")


def test_what_is_not_written_differs_from_zero() -> None:
    assert read_pbtxt("", "f") == {}
    assert read_pbtxt("max_batch_size: 0 dynamic_batching {} input { dims: [] }", "f") == {
        "max_batch_size": 0,
        "dynamic_batching": {},
        "input": [{}],
    }


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ('name: "m"\n  nam: "x"', "2:3", "has no field named \"nam\"; did you mean 'name'?"),
        ("input { dim: 3 }", "1:9", '"ModelInput" has no field named "dim"; did you mean \'dims\'?'),
        ("parameters { kee: 3 }", "1:14", 'has no field named "kee"; known here: key, value'),
        (f"{'x' * 5000}: 3", "1:1", 'has no field named "xxx'),
        ("max_batch_size: 99999999999", "1:17", "out of range"),
        ("input {\n data_type: TYPE_X }", "2:13", "has no value named TYPE_X"),
        ("max_batch_size: 1\nmax_batch_size: 2", "2:", "should not have multiple"),
        ("name: 3", "1:7", "Expected string"),
        ("dynamic_batching {} sequence_batching {}", "1:", "another member of oneof"),
        ("input {", "1:7", 'Expected "}"'),
        ('name: "\\377"', "1:", "utf-8"),
        ("[foo.bar]: 3", "1:", "does not have extensions"),
        ("\x00", "1:1", "Expected identifier"),
    ],
)
def test_text_format_errors_have_file_line_and_column(text: str, place: str, reason: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        read_pbtxt(text, "m/config.pbtxt")
    assert str(caught.value).startswith(f"m/config.pbtxt:{place}")
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@settings(max_examples=200)
@given(st.text(alphabet=st.sampled_from("input{}[]:,\" \n#0123456789-abcname_TYPEFP<>;\\'"), max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read_pbtxt(text, "f")
    except ModelLoadError as error:
        assert str(error).startswith("f:")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\na: 3", "f:3:1: key 'a' is written more than once"),
        ("a: &x 1\nb: *x", "f:2:4: aliases"),
        ("a: &x {c: 1}\nb: {<<: *x}", "f:2:9: aliases"),
        ("a: [", "f:1:5"),
        ("- 1", "f: must be a mapping"),
        ("1: 2", "f: must be a mapping"),
        ("a: {? [1] : 2}", "f:1:7: a key must be a plain name"),
        ("!!python/object/apply:os.system ['true']", "f:1:1"),
        ("a: \x00", "f: unacceptable character"),
        ("[" * 5000, "f: nested too deeply"),
        ("a: 1\n---\nb: 2", "f:2:1"),
    ],
)
def test_yaml_errors_have_a_place(text: str, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_yaml(text, "f")
    assert str(caught.value).startswith(expected)


def test_two_files_or_a_misnamed_one_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path, config__pbtxt="", config__yaml="")
    with pytest.raises(ModelLoadError, match=r"both config\.pbtxt and config\.yaml"):
        load_model_config(folder)
    (folder / "config.yaml").rename(folder / "config.yml")
    load_model_config(folder)
    (folder / "config.pbtxt").unlink()
    with pytest.raises(ModelLoadError, match=r"config\.yml is not read; name it config\.yaml"):
        load_model_config(folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfename", "is not UTF-8 text: byte 0 is 0xff"),
        (b"#" * (LARGEST_CONFIG_BYTES + 1), "is larger than"),
        (b"max_batch_size: -1", "config.yaml: max_batch_size: found -1"),
        (b"name: x", "name: found 'x'; it must equal the model's folder name 'm'"),
    ],
)
def test_bad_files_are_load_errors(tmp_path: Path, content: bytes, expected: str) -> None:
    folder = make_model(tmp_path, config__yaml=content)
    with pytest.raises(ModelLoadError) as caught:
        load_model_config(folder)
    assert expected in str(caught.value)
    assert "config.yaml" in str(caught.value)


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    folder = make_model(tmp_path, config__pbtxt=b"\xef\xbb\xbfmax_batch_size: 2")
    assert load_model_config(folder).max_batch_size == 2


def test_labels_are_read_line_by_line(tmp_path: Path) -> None:
    folder = make_model(tmp_path, config__pbtxt=PBTXT, labels__txt="cat\ndog\n")
    config = load_model_config(folder)
    assert read_labels(folder, config) == {"y": ("cat", "dog")}
    (folder / "labels.txt").unlink()
    with pytest.raises(ModelLoadError, match=r"labels\.txt cannot be read"):
        read_labels(folder, config)


NAMES = st.text(alphabet=st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), min_size=1, max_size=8)
TYPES = st.sampled_from([each.config_name for each in DataType])
DIMS = st.lists(st.one_of(st.just(-1), st.integers(1, 2**62)), max_size=4)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Valid configurations with the fields that this version honours."""
    inputs = draw(st.lists(NAMES, unique=True, max_size=3))
    outputs = draw(st.lists(NAMES, unique=True, max_size=3))
    data: dict[str, Any] = {
        "name": "m",
        "backend": draw(NAMES),
        "input": [
            {"name": name, "data_type": draw(TYPES), "dims": draw(DIMS), "optional": draw(st.booleans())}
            for name in inputs
        ],
        "output": [{"name": name, "data_type": draw(TYPES), "dims": draw(DIMS)} for name in outputs],
        "parameters": {name: {"string_value": value} for name, value in draw(st.dictionaries(NAMES, NAMES)).items()},
        "version_policy": draw(
            st.one_of(
                st.just({"all": {}}),
                st.builds(lambda n: {"latest": {"num_versions": n}}, st.integers(1, 2**32 - 1)),
                st.builds(lambda v: {"specific": {"versions": v}}, st.lists(st.integers(1, 2**62), min_size=1)),
            )
        ),
        "instance_group": [{"count": draw(st.integers(1, 8)), "kind": "KIND_GPU", "gpus": [0, 2]}],
    }
    largest = draw(st.one_of(st.none(), st.integers(0, 2**31 - 1)))
    if largest is not None:
        data["max_batch_size"] = largest
    if largest:
        sizes = st.lists(st.integers(1, largest), max_size=3)
        delay = st.integers(0, 2**53)
        data["dynamic_batching"] = {"preferred_batch_size": draw(sizes), "max_queue_delay_microseconds": draw(delay)}
    return data


@settings(max_examples=150, deadline=None)
@given(configurations(), st.booleans())
def test_text_format_round_trip(data: dict[str, Any], as_one_line: bool) -> None:
    config = ModelConfig.from_dict(data, folder="m")
    message = json_format.ParseDict(config.to_dict(), model_config_pb2.ModelConfig())
    text = text_format.MessageToString(message, as_one_line=as_one_line, as_utf8=True)
    read = ModelConfig.from_dict(read_pbtxt(text, "f"), folder="m")
    if config.max_batch_size == 0:  # proto3 does not write a zero; a person can (see above)
        read = ModelConfig.from_dict({**read.to_dict(), "max_batch_size": 0}, folder="m")
    assert read == config
