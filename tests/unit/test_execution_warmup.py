"""Warm-up batches: what is made up, what is read, what fails a load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aiorch_server.backend import ModelInstance
from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import ModelLoadError, ModelNotReady, RequestError, UnknownModel
from aiorch_server.execution.warmup import WarmupSample, find_mismatch, make_samples, warm_up
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec


def signature(*inputs: TensorSpec, max_batch_size: int = 4) -> ModelSignature:
    return ModelSignature(inputs, (TensorSpec("Y", DataType.FP32, (2,)),), max_batch_size)


X = TensorSpec("X", DataType.FP32, (2,))


class Instance(ModelInstance):
    def __init__(self, run: Callable[[Mapping[str, NumpyArray]], Any]) -> None:
        self.run = run
        self.calls: list[dict[str, NumpyArray]] = []

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        self.calls.append(dict(inputs))
        result: Mapping[str, NumpyArray] = self.run(inputs)
        return result


def config(**fields: Any) -> ModelConfig:
    return ModelConfig.from_dict(fields, folder="m")


def test_zeros_are_made_for_one_row_and_the_largest_batch(tmp_path: Path) -> None:
    samples = make_samples(config(), signature(X, TensorSpec("O", DataType.FP32, (1,), optional=True)), tmp_path)
    assert [(sample.rows, sample.inputs["X"].shape, sample.is_required) for sample in samples] == [
        (1, (1, 2), True),
        (4, (4, 2), True),
    ]
    assert all(set(sample.inputs) == {"X"} for sample in samples)
    (alone,) = make_samples(config(), signature(X, max_batch_size=0), tmp_path)
    assert alone.inputs["X"].shape == (2,)


@pytest.mark.parametrize("spec", [TensorSpec("X", DataType.FP32, (-1,)), TensorSpec("X", DataType.BYTES, (1,))])
def test_zeros_that_are_only_a_guess_do_not_fail_a_load(tmp_path: Path, spec: TensorSpec) -> None:
    samples = make_samples(config(), signature(spec), tmp_path)
    assert [sample.is_required for sample in samples] == [False, False]
    instance = Instance(lambda inputs: 1 / 0)
    warm_up(instance, signature(spec), samples)
    assert len(instance.calls) == 2


def test_zeros_can_be_turned_off_and_huge_ones_are_left_out(tmp_path: Path) -> None:
    assert make_samples(config(parameters={"warmup": "false"}), signature(X), tmp_path) == []
    huge = signature(TensorSpec("X", DataType.FP32, (1024, 1024)), max_batch_size=1024)
    assert [sample.rows for sample in make_samples(config(), huge, tmp_path)] == [1]


@pytest.mark.parametrize("datatype", list(DataType))
def test_every_datatype_can_be_warmed(tmp_path: Path, datatype: DataType) -> None:
    spec = TensorSpec("X", datatype, (3,))
    entry = {
        "name": "w",
        "batch_size": 2,
        "inputs": {"X": {"data_type": datatype.config_name, "dims": [3], "random_data": True}},
    }
    samples = make_samples(config(model_warmup=[entry]), signature(spec), tmp_path)
    for sample in samples:
        assert sample.inputs["X"].dtype == datatype.numpy
    random = samples[-1].inputs["X"]
    assert random.shape == (2, 3)
    again = make_samples(config(model_warmup=[entry]), signature(spec), tmp_path)[-1].inputs["X"]
    assert np.array_equal(random, again), "a warm-up that fails must fail again"


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (lambda inputs: 1 / 0, "ZeroDivisionError"),
        (lambda inputs: {}, "output 'Y' is missing"),
        (lambda inputs: {"Y": [[1, 2]]}, "is a list"),
        (lambda inputs: {"Y": np.zeros((len(inputs["X"]), 2))}, "dtype float64"),
        (lambda inputs: {"Y": np.zeros((1, 2), np.float32)}, r"shape \[1, 2\], expected \[4, 2\]"),
        (lambda inputs: {"Y": np.zeros((len(inputs["X"]), 3), np.float32)}, r"shape \[1, 3\], expected \[1, 2\]"),
    ],
)
def test_a_warm_up_that_fails_says_what_is_wrong(tmp_path: Path, run: Any, text: str) -> None:
    with pytest.raises(ModelLoadError, match=text) as caught:
        warm_up(Instance(run), signature(X), make_samples(config(), signature(X), tmp_path))
    assert 'the parameter warmup "false"' in str(caught.value)


def test_counts_are_kept() -> None:
    instance = Instance(lambda inputs: {"Y": np.zeros((1, 2), np.float32)})
    warm_up(instance, signature(X), [WarmupSample("w", {"X": np.zeros((1, 2), np.float32)}, 1, count=3)])
    assert len(instance.calls) == 3


def test_strings_are_no_mismatch() -> None:
    spec = ModelSignature((), (TensorSpec("Y", DataType.BYTES, (1,)),), 4)
    assert find_mismatch({"Y": np.array([[b"a"]], np.object_)}, spec, 1) == ""
    assert "dtype" in find_mismatch({"Y": np.zeros((1, 1), np.float32)}, spec, 1)


def read_file(tmp_path: Path, content: bytes, spec: TensorSpec, name: str = "x.bin") -> NumpyArray:
    (tmp_path / "warmup").mkdir(exist_ok=True)
    (tmp_path / "warmup" / "x.bin").write_bytes(content)
    given = {"data_type": spec.datatype.config_name, "dims": list(spec.shape), "input_data_file": name}
    entry = {"name": "w", "batch_size": 3, "inputs": {"X": given}}
    settings = config(model_warmup=[entry], parameters={"warmup": "false"})
    (sample,) = make_samples(settings, signature(spec), tmp_path)
    return sample.inputs["X"]


def test_files_hold_one_row_in_raw_form(tmp_path: Path) -> None:
    assert read_file(tmp_path, np.array([1, 2], np.float32).tobytes(), X).tolist() == [[1, 2]] * 3
    strings = read_file(tmp_path, b"\1\0\0\0a\0\0\0\0", TensorSpec("X", DataType.BYTES, (2,)))
    assert strings.tolist() == [[b"a", b""]] * 3


@pytest.mark.parametrize(
    ("content", "spec"),
    [
        (b"\0" * 7, X),
        (b"\0" * 12, X),
        (b"", TensorSpec("X", DataType.BYTES, (1,))),
        (b"\x09\0\0\0a", TensorSpec("X", DataType.BYTES, (1,))),
        (b"\1\0\0\0abc", TensorSpec("X", DataType.BYTES, (1,))),
    ],
)
def test_files_of_the_wrong_size_are_refused(tmp_path: Path, content: bytes, spec: TensorSpec) -> None:
    with pytest.raises(ModelLoadError, match=r"file 'x.bin' holds \d+ bytes, which do not make"):
        read_file(tmp_path, content, spec)


def test_missing_files_and_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"'y\.bin' cannot be read from the warmup folder"):
        read_file(tmp_path, b"", X, "y.bin")
    (tmp_path / "secret").write_bytes(b"\0" * 8)
    (tmp_path / "warmup" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelLoadError, match="outside the model's warmup folder"):
        read_file(tmp_path, b"", X, "link")


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"inputs": {}}, r"inputs \['X'\] are missing"),
        ({"inputs": {"X": ("TYPE_FP32", [2]), "Z": ("TYPE_FP32", [2])}}, r"inputs \['Z'\] do not exist"),
        ({"inputs": {"X": ("TYPE_INT8", [2])}}, "data_type is TYPE_INT8, the model takes TYPE_FP32"),
        ({"inputs": {"X": ("TYPE_FP32", [3])}}, r"dims are \[3\], the model takes \[2\]"),
        ({"inputs": {"X": ("TYPE_FP32", [2])}, "batch_size": 5}, "batch_size is 5"),
        ({"inputs": {"X": ("TYPE_FP32", [2])}, "count": 5000}, "count is 5000"),
    ],
)
def test_entries_that_do_not_fit_the_model_are_refused(tmp_path: Path, entry: dict[str, Any], text: str) -> None:
    inputs = {
        name: {"data_type": datatype, "dims": dims, "zero_data": True}
        for name, (datatype, dims) in entry["inputs"].items()
    }
    with pytest.raises(ModelLoadError, match=text):
        make_samples(config(model_warmup=[entry | {"name": "w", "inputs": inputs}]), signature(X), tmp_path)


def test_entries_that_take_too_much_memory_are_refused(tmp_path: Path) -> None:
    spec = TensorSpec("X", DataType.FP32, (-1,))
    given = {"data_type": "TYPE_FP32", "dims": [10**9], "zero_data": True}
    with pytest.raises(ModelLoadError, match="takes more than"):
        make_samples(config(model_warmup=[{"name": "w", "inputs": {"X": given}}]), signature(spec), tmp_path)


@pytest.mark.parametrize(
    "error", [UnknownModel("'callee' is not found"), RequestError("an amount is above 0"), ModelNotReady("loading")]
)
def test_zeros_that_the_model_refuses_do_not_fail_a_load(tmp_path: Path, error: Exception) -> None:
    """Nobody asked for them, and another model that this one asks may not be there yet."""
    asked: list[int] = []

    def refuse(inputs: Mapping[str, NumpyArray]) -> Any:
        asked.append(len(inputs["X"]))
        raise error

    own = signature(TensorSpec("X", DataType.FP32, (2,)))
    samples = make_samples(config(), own, tmp_path)
    assert all(sample.is_required for sample in samples)
    warm_up(Instance(refuse), own, samples)
    assert asked == [1, 4]
