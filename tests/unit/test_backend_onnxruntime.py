from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from aiorch_backends.onnxruntime import OnnxRuntimeBackend
from aiorch_backends.onnxruntime import session as session_module
from aiorch_backends.onnxruntime.instance import BrainFloatInstance, NativeInstance, OnnxInstance, TextInstance
from onnx import TensorProto, helper, numpy_helper

from aiorch_server.backend import Backend, DeclaredSignature, LoadContext
from aiorch_server.errors import ModelLoadError, RequestError
from aiorch_server.testing import BackendConformance
from aiorch_server.types import DataType, NumpyArray, TensorSpec


@pytest.fixture(autouse=True, params=["native", "python"])
def api(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ONNX Runtime's C API, and its Python API, which serves where the other cannot."""
    if request.param == "python":
        monkeypatch.setattr(session_module, "native", None)
    return str(request.param)


def save_graph(
    path: Path,
    nodes: list[Any],
    inputs: list[Any],
    outputs: list[Any],
    constants: Mapping[str, NumpyArray] | None = None,
) -> Path:
    initializers = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def save_echo(path: Path, element: int, shape: tuple[int | str, ...] = ("batch", 2)) -> Path:
    info = helper.make_tensor_value_info
    node = helper.make_node("Identity", ["x"], ["y"])
    return save_graph(path, [node], [info("x", element, shape)], [info("y", element, shape)])


def make_context(artefact: Path, **changes: Any) -> LoadContext:
    changes.setdefault("declared", DeclaredSignature())
    return LoadContext("model", 1, artefact.parent.parent, artefact, **changes)


class OnnxConformance(BackendConformance):
    def make_backend(self) -> Backend:
        return OnnxRuntimeBackend()


class TestLinearModel(OnnxConformance):
    weights = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)

    def write_artefact(self, folder: Path) -> Path:
        info = helper.make_tensor_value_info
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Add", ["product", "offset"], ["scores"]),
            helper.make_node("ArgMax", ["scores"], ["label"], axis=1, keepdims=0),
        ]
        inputs = [info("x", TensorProto.FLOAT, ["n", 4]), info("offset", TensorProto.FLOAT, ["n", 1])]
        outputs = [info("scores", TensorProto.FLOAT, ["n", 3]), info("label", TensorProto.INT64, ["n"])]
        return save_graph(folder / "model.onnx", nodes, inputs, outputs, {"w": self.weights})

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        scores = np.asarray(inputs["x"], np.float32) @ self.weights + np.asarray(inputs["offset"], np.float32)
        return {"scores": scores, "label": scores.argmax(axis=1)}


class TestFixedShape(OnnxConformance):
    is_batching = False

    def write_artefact(self, folder: Path) -> Path:
        return save_echo(folder / "model.onnx", TensorProto.DOUBLE, (2, 3))

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return {"y": inputs["x"]}


class TestTexts(OnnxConformance):
    def write_artefact(self, folder: Path) -> Path:
        return save_echo(folder / "model.onnx", TensorProto.STRING, ("batch", 3))

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return {"y": inputs["x"]}


class TestBrainFloats(OnnxConformance):
    def write_artefact(self, folder: Path) -> Path:
        return save_echo(folder / "model.onnx", TensorProto.BFLOAT16)

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return {"y": inputs["x"]}


@pytest.mark.parametrize(
    ("element", "datatype"),
    [
        (TensorProto.BOOL, DataType.BOOL),
        (TensorProto.UINT8, DataType.UINT8),
        (TensorProto.UINT16, DataType.UINT16),
        (TensorProto.UINT32, DataType.UINT32),
        (TensorProto.UINT64, DataType.UINT64),
        (TensorProto.INT8, DataType.INT8),
        (TensorProto.INT16, DataType.INT16),
        (TensorProto.INT32, DataType.INT32),
        (TensorProto.INT64, DataType.INT64),
        (TensorProto.FLOAT16, DataType.FP16),
        (TensorProto.FLOAT, DataType.FP32),
        (TensorProto.DOUBLE, DataType.FP64),
        (TensorProto.STRING, DataType.BYTES),
        (TensorProto.BFLOAT16, DataType.BF16),
    ],
)
def test_every_datatype(tmp_path: Path, element: int, datatype: DataType, api: str) -> None:
    backend, context = OnnxRuntimeBackend(), make_context(save_echo(tmp_path / "model.onnx", element))
    signature = backend.inspect(context)
    assert signature.inputs == (TensorSpec("x", datatype, (2,)),)
    assert signature.outputs == (TensorSpec("y", datatype, (2,)),)
    instance = backend.load(context, signature)
    others = {DataType.BYTES: TextInstance, DataType.BF16: BrainFloatInstance}
    is_native = api == "native" and datatype is not DataType.BYTES
    assert type(instance) is (NativeInstance if is_native else others.get(datatype, OnnxInstance))
    assert (instance.compiled is not None) is is_native
    rows = np.array([[b"", b"\xc3\xa9"]], object) if datatype is DataType.BYTES else np.ones((1, 2), datatype.numpy)
    answer = instance.execute({"x": rows})["y"]
    assert answer.dtype == datatype.numpy
    np.testing.assert_array_equal(answer, rows)


def test_texts_beside_brain_floats_are_refused(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["s"], ["t"])]
    inputs = [info("x", TensorProto.BFLOAT16, ["n"]), info("s", TensorProto.STRING, ["n"])]
    outputs = [info("y", TensorProto.BFLOAT16, ["n"]), info("t", TensorProto.STRING, ["n"])]
    context = make_context(save_graph(tmp_path / "model.onnx", nodes, inputs, outputs))
    backend = OnnxRuntimeBackend()
    with pytest.raises(ModelLoadError, match="BYTES and BF16"):
        backend.load(context, backend.inspect(context))


def test_what_fails_is_not_written_to_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Else a client could fill the log: the reason is in the error, which the server logs now and then."""
    info = helper.make_tensor_value_info
    inputs, outputs = [info("x", TensorProto.INT64, ["n", 1])], [info("y", TensorProto.FLOAT, ["n", 1])]
    table = {"table": np.arange(10, dtype=np.float32)}
    node = helper.make_node("Gather", ["table", "x"], ["y"])
    path = save_graph(tmp_path / "model.onnx", [node], inputs, outputs, table)
    backend, context = OnnxRuntimeBackend(), make_context(path)
    instance = backend.load(context, backend.inspect(context))
    with pytest.raises(Exception, match="idx=99"):
        instance.execute({"x": np.array([[99]])})
    assert capfd.readouterr().err == ""


def test_broken_utf8_is_the_callers_fault(tmp_path: Path) -> None:
    backend, context = OnnxRuntimeBackend(), make_context(save_echo(tmp_path / "model.onnx", TensorProto.STRING))
    instance = backend.load(context, backend.inspect(context))
    with pytest.raises(RequestError, match="input 'x', element 1: not UTF-8"):
        instance.execute({"x": np.array([[b"fine", b"\xff"]], object)})


def test_default_batch_size_comes_from_the_server(tmp_path: Path) -> None:
    artefact = save_echo(tmp_path / "model.onnx", TensorProto.FLOAT)
    assert OnnxRuntimeBackend().inspect(make_context(artefact)).max_batch_size == 32
    assert OnnxRuntimeBackend().inspect(make_context(artefact, default_max_batch_size=5)).max_batch_size == 5


def test_whole_shapes_without_batching(tmp_path: Path) -> None:
    artefact = save_echo(tmp_path / "model.onnx", TensorProto.FLOAT, ("batch", "width"))
    signature = OnnxRuntimeBackend().inspect(make_context(artefact, declared=DeclaredSignature(max_batch_size=0)))
    assert (signature.max_batch_size, signature.inputs[0].shape) == (0, (-1, -1))
    whole = DeclaredSignature((TensorSpec("x", DataType.FP32, (-1, 7)),), (TensorSpec("y", DataType.FP32, (-1, 7)),))
    signature = OnnxRuntimeBackend().inspect(make_context(artefact, declared=whole))
    assert (signature.max_batch_size, signature.inputs) == (0, whole.inputs)


def test_fixed_first_dimension_cannot_batch(tmp_path: Path) -> None:
    artefact = save_echo(tmp_path / "model.onnx", TensorProto.FLOAT, (1, 2))
    with pytest.raises(ModelLoadError, match=r"max_batch_size 4 is declared, but .* 'x' \[1,2\] is not variable"):
        OnnxRuntimeBackend().inspect(make_context(artefact, declared=DeclaredSignature(max_batch_size=4)))


def test_fixed_size_cannot_be_widened(tmp_path: Path) -> None:
    artefact = save_echo(tmp_path / "model.onnx", TensorProto.FLOAT)
    declared = DeclaredSignature((TensorSpec("x", DataType.FP32, (-1,)),), (), 8)
    with pytest.raises(ModelLoadError, match=r"dims \[-1\], but the model has \[2\] \(without the batch dimension\)"):
        OnnxRuntimeBackend().inspect(make_context(artefact, declared=declared))


def test_undeclared_input_is_named(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    inputs = [info(name, TensorProto.FLOAT, ["n", 2]) for name in ("a", "b")]
    node = helper.make_node("Add", ["a", "b"], ["y"])
    artefact = save_graph(tmp_path / "model.onnx", [node], inputs, [info("y", TensorProto.FLOAT, ["n", 2])])
    declared = DeclaredSignature((TensorSpec("a", DataType.FP32, (2,)),), (), 8)
    with pytest.raises(ModelLoadError, match="input 'b' of the model is not declared"):
        OnnxRuntimeBackend().inspect(make_context(artefact, declared=declared))


def test_overridable_initializer_is_an_optional_input(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    inputs = [info("x", TensorProto.FLOAT, ["n", 2]), info("scale", TensorProto.FLOAT, [1])]
    node = helper.make_node("Mul", ["x", "scale"], ["y"])
    outputs = [info("y", TensorProto.FLOAT, ["n", 2])]
    constants = {"scale": np.array([2.0], np.float32)}
    artefact = save_graph(tmp_path / "model.onnx", [node], inputs, outputs, constants)
    backend = OnnxRuntimeBackend()
    assert [spec.name for spec in backend.inspect(make_context(artefact)).inputs] == ["x"]
    declared = DeclaredSignature(
        (TensorSpec("x", DataType.FP32, (-1, 2)), TensorSpec("scale", DataType.FP32, (1,), optional=True)), (), 0
    )
    context = make_context(artefact, declared=declared)
    instance = backend.load(context, backend.inspect(context))
    x = np.ones((1, 2), np.float32)
    assert instance.execute({"x": x})["y"].tolist() == [[2, 2]]
    assert instance.execute({"x": x, "scale": np.array([3], np.float32)})["y"].tolist() == [[3, 3]]


@pytest.fixture
def zipmap_model(tmp_path: Path) -> Path:
    node = helper.make_node("ZipMap", ["x"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    keep = helper.make_node("Identity", ["x"], ["y"])
    value = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    maps = helper.make_value_info("maps", helper.make_sequence_type_proto(value))
    info = helper.make_tensor_value_info
    inputs, outputs = [info("x", TensorProto.FLOAT, ["n", 2])], [info("y", TensorProto.FLOAT, ["n", 2]), maps]
    graph = helper.make_graph([node, keep], "graph", inputs, outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_maps_are_left_out_with_advice(zipmap_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    signature = OnnxRuntimeBackend().inspect(make_context(zipmap_model))
    assert [spec.name for spec in signature.outputs] == ["y"]
    assert "zipmap" in caplog.text
    declared = DeclaredSignature(outputs=(TensorSpec("maps", DataType.FP32, (2,)),))
    with pytest.raises(ModelLoadError, match=r"not a tensor.*zipmap"):
        OnnxRuntimeBackend().inspect(make_context(zipmap_model, declared=declared))


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has the GPU build")
def test_fall_back_to_cpu_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = make_context(save_echo(tmp_path / "model.onnx", TensorProto.FLOAT), device="cuda:0")
    backend = OnnxRuntimeBackend()
    with caplog.at_level(logging.WARNING):
        instance = backend.load(context, backend.inspect(context))
    assert isinstance(instance, OnnxInstance)
    assert instance.provider == "CPUExecutionProvider"
    assert "asked for cuda:0 but runs on CPUExecutionProvider" in caplog.text


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="has the GPU build")
def test_fall_back_to_cpu_can_be_refused(tmp_path: Path) -> None:
    artefact = save_echo(tmp_path / "model.onnx", TensorProto.FLOAT)
    context = make_context(artefact, device="cuda:0", parameters={"require_gpu": "true"})
    with pytest.raises(ModelLoadError, match="cuda:0 is required, but ONNX Runtime gave CPUExecutionProvider"):
        OnnxRuntimeBackend().inspect(context)


@pytest.mark.parametrize(
    ("key", "value"),
    [("intra_op_thread_count", "0"), ("intra_op_thread_count", "many"), ("graph_optimization_level", "more")],
)
def test_bad_parameter_is_named(tmp_path: Path, key: str, value: str) -> None:
    artefact = save_echo(tmp_path / "model.onnx", TensorProto.FLOAT)
    with pytest.raises(ModelLoadError, match=key):
        OnnxRuntimeBackend().inspect(make_context(artefact, parameters={key: value}))


def count_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_threads_reach_the_session(tmp_path: Path, api: str) -> None:
    artefact = save_echo(tmp_path / "model.onnx", TensorProto.FLOAT)
    kept = []  # else threads of the last end while those of the next are counted
    for context, wanted in (
        (make_context(artefact, threads=2), 2),
        (make_context(artefact, threads=2, parameters={"intra_op_thread_count": "3"}), 3),
    ):
        backend, before = OnnxRuntimeBackend(), count_threads()
        instance = backend.load(context, backend.inspect(context))
        kept.append((backend, instance))
        assert count_threads() - before == wanted - 1  # the calling thread is one of them
        if api == "python":
            assert instance._session.get_session_options().intra_op_num_threads == wanted  # type: ignore[attr-defined]


def test_inspected_session_is_used_once(tmp_path: Path) -> None:
    backend, context = OnnxRuntimeBackend(), make_context(save_echo(tmp_path / "model.onnx", TensorProto.FLOAT))
    signature = backend.inspect(context)
    first, second = backend.load(context, signature), backend.load(context, signature)
    assert first._session is not second._session  # type: ignore[attr-defined]


def test_changed_artefact_is_read_anew(tmp_path: Path) -> None:
    backend, context = OnnxRuntimeBackend(), make_context(save_echo(tmp_path / "model.onnx", TensorProto.FLOAT))
    backend.inspect(context)
    save_echo(tmp_path / "model.onnx", TensorProto.DOUBLE, ("batch", 3))
    signature = backend.inspect(context)
    rows = np.ones((1, 3), np.float64)
    np.testing.assert_array_equal(backend.load(context, signature).execute({"x": rows})["y"], rows)


def test_missing_framework_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = save_echo(tmp_path / "model.onnx", TensorProto.FLOAT)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelLoadError, match=r"'onnxruntime' is not installed.*aiorchestrator\[onnx\]"):
        OnnxRuntimeBackend().inspect(make_context(artefact))
