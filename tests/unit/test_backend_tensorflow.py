from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import keras
import numpy as np
import pytest
import tensorflow as tf
from aiorch_backends.tensorflow import TensorFlowBackend
from aiorch_backends.tensorflow.instance import TensorFlowInstance

from aiorch_server.backend import Backend, DeclaredSignature, LoadContext
from aiorch_server.errors import ModelLoadError
from aiorch_server.testing import BackendConformance
from aiorch_server.types import DataType, NumpyArray, TensorSpec

FLOAT = DataType.FP32


def make_context(artefact: Path, **changes: Any) -> LoadContext:
    changes.setdefault("declared", DeclaredSignature())
    return LoadContext("model", 1, artefact.parent.parent, artefact, **changes)


def save_function(folder: Path, function: Any, *specs: Any, name: str = "serving_default") -> Path:
    module = tf.Module()
    module.function = tf.function(function, input_signature=specs)
    tf.saved_model.save(module, str(folder / "model.savedmodel"), signatures={name: module.function})
    return folder / "model.savedmodel"


def save_keras(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        # Keras reads variables through np.array(x), for which numpy 2 asks __array__ for a keyword that it lacks.
        warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
        model.save(folder / "model.keras")
    return folder / "model.keras"


class TensorFlowConformance(BackendConformance):
    model: ClassVar[Any]

    def make_backend(self) -> Backend:
        return TensorFlowBackend()


class TestSavedModel(TensorFlowConformance):
    weights = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)

    def write_artefact(self, folder: Path) -> Path:
        weights = tf.constant(self.weights)
        return save_function(
            folder,
            lambda x, text: {"scores": tf.matmul(x, weights), "upper": tf.strings.upper(text)},
            tf.TensorSpec([None, 4], tf.float32, "x"),
            tf.TensorSpec([None, 2], tf.string, "text"),
        )

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        texts = np.array([text.upper() for text in inputs["text"].ravel().tolist()], object)
        return {
            "scores": np.asarray(inputs["x"], np.float32) @ self.weights,
            "upper": texts.reshape(inputs["text"].shape),
        }

    def test_broken_utf8_passes(self, backend: Backend, context: LoadContext) -> None:
        # TensorFlow's strings are bytes: nothing is decoded on the way.
        instance = backend.load(context, backend.inspect(context))
        texts = np.array([[b"\xff\x00a", b"tail\x00"]], object)
        upper = instance.execute({"x": np.zeros((1, 4), np.float32), "text": texts})["upper"]
        assert upper.tolist() == [[b"\xff\x00A", b"TAIL\x00"]]


class TestFixedShape(TensorFlowConformance):
    is_batching = False

    def write_artefact(self, folder: Path) -> Path:
        return save_function(folder, lambda x: {"y": x + 1}, tf.TensorSpec([2, 2], tf.int64, "x"))

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return {"y": np.asarray(inputs["x"], np.int64) + 1}


class TestBrainFloats(TensorFlowConformance):
    def write_artefact(self, folder: Path) -> Path:
        return save_function(folder, lambda x: {"y": -x}, tf.TensorSpec([None, 2], tf.bfloat16, "x"))

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return {"y": np.asarray(inputs["x"], np.uint16) ^ np.uint16(0x8000)}


class KerasConformance(TensorFlowConformance):
    @classmethod
    def build(cls) -> Any:
        raise NotImplementedError

    def write_artefact(self, folder: Path) -> Path:
        keras.utils.set_random_seed(5)
        type(self).model = self.build()
        return save_keras(self.model, folder)


class TestSequential(KerasConformance):
    @classmethod
    def build(cls) -> Any:
        layers = [keras.Input((4,), name="image"), keras.layers.Dense(3, name="hidden")]
        return keras.Sequential([*layers, keras.layers.Softmax(name="probabilities")])

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return {"probabilities": self.model(inputs["image"], training=False).numpy()}


class TestDictionaries(KerasConformance):
    """Takes and gives dictionaries; the keys of outputs are not the names of layers, and orders differ."""

    @classmethod
    def build(cls) -> Any:
        left, right = keras.Input((4,), name="left"), keras.Input((2,), dtype="int32", name="right")
        scores = keras.layers.Dense(3, name="dense")(left)
        best = keras.ops.cast(keras.ops.argmax(scores, axis=1), "int64")
        outputs = {"scores": scores, "best": best, "right": right * 2}
        return keras.Model({"right": right, "left": left}, outputs)

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        results = self.model({"left": inputs["left"], "right": inputs["right"]}, training=False)
        return {name: tensor.numpy() for name, tensor in results.items()}


class TestLists(KerasConformance):
    @classmethod
    def build(cls) -> Any:
        left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
        total = keras.layers.Add(name="total")([left, right])
        return keras.Model([left, right], [keras.layers.Dense(2, name="scores")(total), total])

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        scores, total = self.model([inputs["left"], inputs["right"]], training=False)
        return {"scores": scores.numpy(), "total": total.numpy()}


@pytest.mark.parametrize(
    ("dtype", "datatype"),
    [
        (tf.bool, DataType.BOOL),
        (tf.uint8, DataType.UINT8),
        (tf.uint16, DataType.UINT16),
        (tf.uint32, DataType.UINT32),
        (tf.uint64, DataType.UINT64),
        (tf.int8, DataType.INT8),
        (tf.int16, DataType.INT16),
        (tf.int32, DataType.INT32),
        (tf.int64, DataType.INT64),
        (tf.float16, DataType.FP16),
        (tf.float32, DataType.FP32),
        (tf.float64, DataType.FP64),
    ],
    ids=lambda value: str(value),
)
def test_every_datatype(tmp_path: Path, dtype: Any, datatype: DataType) -> None:
    artefact = save_function(tmp_path, lambda x: {"y": tf.identity(x)}, tf.TensorSpec([None, 2], dtype, "x"))
    backend, context = TensorFlowBackend(), make_context(artefact)
    signature = backend.inspect(context)
    assert signature.inputs == (TensorSpec("x", datatype, (2,)),)
    rows = np.ones((3, 2), datatype.numpy)
    answer = backend.load(context, signature).execute({"x": rows})["y"]
    assert answer.dtype == datatype.numpy
    np.testing.assert_array_equal(answer, rows)


def test_other_signature_by_parameter(tmp_path: Path) -> None:
    artefact = save_function(tmp_path, lambda x: {"y": x}, tf.TensorSpec([None], tf.float32, "x"), name="other")
    with pytest.raises(ModelLoadError, match="no signature 'serving_default', only 'other'"):
        TensorFlowBackend().inspect(make_context(artefact))
    context = make_context(artefact, parameters={"signature_name": "other"})
    assert TensorFlowBackend().inspect(context).inputs == (TensorSpec("x", FLOAT, ()),)


def test_unknown_rank_must_be_declared(tmp_path: Path) -> None:
    artefact = save_function(tmp_path, lambda x: {"y": x}, tf.TensorSpec(None, tf.float32, "x"))
    with pytest.raises(ModelLoadError, match=r'how many dimensions input \'x\' has.*name: "x" data_type: TYPE_FP32'):
        TensorFlowBackend().inspect(make_context(artefact))
    declared = DeclaredSignature((TensorSpec("x", FLOAT, (3,)),), (TensorSpec("y", FLOAT, (3,)),), 4)
    context = make_context(artefact, declared=declared)
    backend = TensorFlowBackend()
    signature = backend.inspect(context)
    assert (signature.inputs, signature.max_batch_size) == (declared.inputs, 4)
    rows = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(backend.load(context, signature).execute({"x": rows})["y"], rows)


def test_complex_tensors_are_refused(tmp_path: Path) -> None:
    artefact = save_function(tmp_path, lambda x: {"y": x}, tf.TensorSpec([None], tf.complex64, "x"))
    with pytest.raises(ModelLoadError, match="'x' is complex64, which the V2 protocol cannot carry"):
        TensorFlowBackend().inspect(make_context(artefact))


def test_empty_folder_is_no_saved_model(tmp_path: Path) -> None:
    (tmp_path / "model.savedmodel").mkdir()
    with pytest.raises(ModelLoadError, match=r"model\.savedmodel'"):
        TensorFlowBackend().inspect(make_context(tmp_path / "model.savedmodel"))


def test_lambdas_are_code_and_refused_unless_pickles_are_allowed(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x * 3, output_shape=(2,), name="out")])
    save_keras(model, tmp_path)
    with pytest.raises(ModelLoadError, match=r"[Ll]ambda"):
        TensorFlowBackend().inspect(make_context(tmp_path / "model.keras"))
    backend, context = TensorFlowBackend(), make_context(tmp_path / "model.keras", allow_code=True)
    signature = backend.inspect(context)
    rows = {signature.inputs[0].name: np.ones((1, 2), np.float32)}
    assert backend.load(context, signature).execute(rows)["out"].tolist() == [[3, 3]]


def test_first_model_sizes_the_pool(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    artefact = save_function(tmp_path, lambda x: {"y": x}, tf.TensorSpec([None], tf.float32, "x"))
    backend = TensorFlowBackend()
    backend.inspect(make_context(artefact, threads=1))
    with caplog.at_level(logging.INFO, logger="aiorch_backends.tensorflow"):
        backend.inspect(make_context(artefact, threads=7))
    assert "7 were asked for" in caplog.text


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="TensorFlow sees a GPU here")
def test_missing_gpu_is_seen_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    artefact = save_function(tmp_path, lambda x: {"y": x}, tf.TensorSpec([None], tf.float32, "x"))
    backend, context = TensorFlowBackend(), make_context(artefact, device="cuda:0")
    instance = backend.load(context, backend.inspect(context))
    assert isinstance(instance, TensorFlowInstance) and instance.device == "/CPU:0"
    assert "asked for cuda:0 but runs on the CPU" in caplog.text
    with pytest.raises(ModelLoadError, match="cuda:0 is required, but TensorFlow sees 0 GPUs"):
        backend.inspect(make_context(artefact, device="cuda:0", parameters={"require_gpu": "true"}))
