from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from aiorch_backends.pytorch import PyTorchBackend
from aiorch_backends.pytorch.instance import TorchInstance
from torch import Tensor, nn

from aiorch_server.backend import Backend, DeclaredSignature, LoadContext
from aiorch_server.errors import ModelExecutionError, ModelLoadError
from aiorch_server.testing import BackendConformance
from aiorch_server.types import DataType, ModelSignature, NumpyArray, TensorSpec


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layer = nn.Linear(4, 3)

    def forward(self, image: Tensor, scale: Tensor) -> Tensor:
        scores: Tensor = self.layer(image) * scale
        return scores


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear()

    def forward(self, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
        scores = self.linear(image, scale)
        return {"scores": scores, "best": scores.argmax(dim=1)}


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, x.sum(dim=1)


SAMPLE = (torch.zeros(2, 4), torch.zeros(2, 1))


def export(path: Path, module: nn.Module, sample: tuple[Any, ...], dynamic: Any = None) -> Path:
    torch.export.save(torch.export.export(module.eval(), sample, dynamic_shapes=dynamic), path)
    return path


def script(path: Path, module: nn.Module) -> Path:
    torch.jit.save(torch.jit.script(module.eval()), path)
    return path


def run(module: nn.Module, *inputs: NumpyArray) -> Any:
    with torch.inference_mode():
        return module(*[torch.from_numpy(array.copy()) for array in inputs])


def make_context(artefact: Path, **changes: Any) -> LoadContext:
    changes.setdefault("declared", DeclaredSignature())
    return LoadContext("model", 1, artefact.parent.parent, artefact, **changes)


class TorchConformance(BackendConformance):
    def make_backend(self) -> Backend:
        return PyTorchBackend()


class TestExported(TorchConformance):
    def write_artefact(self, folder: Path) -> Path:
        batch = torch.export.Dim("batch", min=1, max=64)
        return export(folder / "model.pt2", Named(), SAMPLE, {"image": {0: batch}, "scale": {0: batch}})

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        scores = run(Linear().eval(), inputs["image"], inputs["scale"]).numpy()
        return {"scores": scores, "best": scores.argmax(axis=1)}


class TestExportedWithTritonsNames(TestExported):
    declared = DeclaredSignature(
        (TensorSpec("INPUT__1", DataType.FP32, (1,)), TensorSpec("INPUT__0", DataType.FP32, (4,))),
        (TensorSpec("OUTPUT__1", DataType.INT64, ()), TensorSpec("OUTPUT__0", DataType.FP32, (3,))),
        8,
    )

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        named = super().expect({"image": inputs["INPUT__0"], "scale": inputs["INPUT__1"]})
        return {"OUTPUT__0": named["scores"], "OUTPUT__1": named["best"]}


class TestExportedFixedShape(TorchConformance):
    is_batching = False

    def write_artefact(self, folder: Path) -> Path:
        return export(folder / "model.pt2", Pair(), (torch.zeros(3, 2, dtype=torch.float64),))

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        x = np.asarray(inputs["x"], np.float64)
        return {"OUTPUT__0": x * 2, "OUTPUT__1": x.sum(axis=1)}


class TestScripted(TorchConformance):
    declared = DeclaredSignature(
        (TensorSpec("image", DataType.FP32, (4,)), TensorSpec("scale", DataType.FP32, (1,))),
        (TensorSpec("scores", DataType.FP32, (3,)),),
        8,
    )

    def write_artefact(self, folder: Path) -> Path:
        return script(folder / "model.pt", Linear())

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return {"scores": run(Linear().eval(), inputs["image"], inputs["scale"]).numpy()}

    def test_wrong_declaration_is_refused(self, backend: Backend, context: LoadContext) -> None:
        # The file knows the names of arguments and the number of results, nothing else.
        right = self.declared
        for inputs, outputs, text in (
            ((TensorSpec("picture", DataType.FP32, (4,)), right.inputs[1]), right.outputs, "picture.*image, scale"),
            (right.inputs[:1], right.outputs, "'scale' is not declared"),
            ((*right.inputs, TensorSpec("INPUT__0", DataType.FP32, (4,))), right.outputs, "are the same argument"),
            (right.inputs, (*right.outputs, TensorSpec("b", DataType.FP32, (1,))), r"returns 1 tensor\(s\)"),
            (right.inputs, (TensorSpec("OUTPUT__1", DataType.FP32, (3,)),), r"returns 1 tensor\(s\)"),
            (right.inputs, (TensorSpec("a", DataType.BYTES, (3,)),), "'a' is declared TYPE_STRING"),
        ):
            wrong = make_context(context.artefact, declared=DeclaredSignature(inputs, outputs, 8))
            with pytest.raises(ModelLoadError, match=text):
                backend.inspect(wrong)

    def test_wrong_output_type_is_seen_when_it_runs(self, backend: Backend, context: LoadContext) -> None:
        outputs = (TensorSpec("scores", DataType.FP64, (3,)),)
        wrong = make_context(context.artefact, declared=DeclaredSignature(self.declared.inputs, outputs, 8))
        instance = backend.load(wrong, backend.inspect(wrong))
        with pytest.raises(ModelExecutionError, match="'scores' is TYPE_FP32, but TYPE_FP64 is declared"):
            instance.execute(self.make_inputs(ModelSignature(self.declared.inputs, outputs, 8), 1))


class TestScriptedWithTritonsNames(TestScripted):
    declared = DeclaredSignature(
        (TensorSpec("INPUT__0", DataType.FP32, (4,)), TensorSpec("INPUT__1", DataType.FP32, (1,))),
        (TensorSpec("OUTPUT__0", DataType.FP32, (3,)),),
        8,
    )

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        named = super().expect({"image": inputs["INPUT__0"], "scale": inputs["INPUT__1"]})
        return {"OUTPUT__0": named["scores"]}

    def test_wrong_declaration_is_refused(self, backend: Backend, context: LoadContext) -> None:
        declared = DeclaredSignature(
            (*self.declared.inputs, TensorSpec("INPUT__2", DataType.FP32, (1,))), self.declared.outputs, 8
        )
        with pytest.raises(ModelLoadError, match=r"INPUT__2.*image, scale"):
            backend.inspect(make_context(context.artefact, declared=declared))

    test_wrong_output_type_is_seen_when_it_runs: ClassVar[None] = None  # type: ignore[assignment]


class TestScriptedBrainFloats(TorchConformance):
    """Traced, two results in a tuple, BF16 in and out."""

    declared = DeclaredSignature(
        (TensorSpec("x", DataType.BF16, (2,)),),
        (TensorSpec("OUTPUT__0", DataType.BF16, (2,)), TensorSpec("OUTPUT__1", DataType.BF16, ())),
        8,
    )

    def write_artefact(self, folder: Path) -> Path:
        trace: Any = torch.jit.trace
        torch.jit.save(trace(Pair(), torch.zeros(2, 2, dtype=torch.bfloat16)), folder / "model.pt")
        return folder / "model.pt"

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        x = torch.from_numpy(inputs["x"].copy()).view(torch.bfloat16)
        doubled, summed = Pair()(x)
        return {
            "OUTPUT__0": doubled.view(torch.uint16).numpy(),
            "OUTPUT__1": summed.view(torch.uint16).numpy(),
        }

    def test_wrong_declaration_is_refused(self, backend: Backend, context: LoadContext) -> None:
        wrong = DeclaredSignature((TensorSpec("y", DataType.BF16, (2,)),), self.declared.outputs, 8)
        with pytest.raises(ModelLoadError, match="'y' is declared, but forward takes"):
            backend.inspect(make_context(context.artefact, declared=wrong))


def test_bounds_of_the_dimension_limit_the_batch(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=6)
    artefact = export(tmp_path / "model.pt2", Pair(), (torch.zeros(2, 2),), {"x": {0: batch}})
    assert PyTorchBackend().inspect(make_context(artefact)).max_batch_size == 6
    with pytest.raises(ModelLoadError, match="8 is declared, but the model takes 6 rows at most"):
        PyTorchBackend().inspect(make_context(artefact, declared=DeclaredSignature(max_batch_size=8)))


def test_unbounded_dimension_takes_the_servers_default(tmp_path: Path) -> None:
    artefact = export(tmp_path / "model.pt2", Pair(), (torch.zeros(2, 2),), {"x": {0: torch.export.Dim.DYNAMIC}})
    signature = PyTorchBackend().inspect(make_context(artefact, default_max_batch_size=48))
    assert (signature.max_batch_size, signature.inputs[0].shape) == (48, (2,))


def test_unrelated_dynamic_dimensions_are_no_batch(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a[:, None] * b[None, :]

    dynamic = {"a": {0: torch.export.Dim("m")}, "b": {0: torch.export.Dim("n")}}
    artefact = export(tmp_path / "model.pt2", Outer(), (torch.zeros(2), torch.zeros(3)), dynamic)
    signature = PyTorchBackend().inspect(make_context(artefact))
    assert (signature.max_batch_size, signature.inputs[0].shape, signature.outputs[0].shape) == (0, (-1,), (-1, -1))
    with pytest.raises(ModelLoadError, match="share no first dimension"):
        PyTorchBackend().inspect(make_context(artefact, declared=DeclaredSignature(max_batch_size=4)))


def test_nested_arguments_are_put_back_together(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor], *, extra: dict[str, Tensor]) -> Tensor:
            return pair[0] + 10 * pair[1] + 100 * extra["k"]

    # Three tensors: export would take one that is passed thrice for a single input.
    pair = (torch.zeros(2), torch.zeros(2))
    program = torch.export.export(Nested(), (pair,), {"extra": {"k": torch.zeros(2)}})
    torch.export.save(program, tmp_path / "model.pt2")
    backend, context = PyTorchBackend(), make_context(tmp_path / "model.pt2")
    signature = backend.inspect(context)
    assert [spec.name for spec in signature.inputs] == ["pair_0", "pair_1", "extra_k"]
    ones = np.ones(2, np.float32)
    inputs = {"extra_k": ones * 3, "pair_1": ones * 2, "pair_0": ones}
    assert backend.load(context, signature).execute(inputs)["OUTPUT__0"].tolist() == [321, 321]


@pytest.mark.parametrize(
    "datatype", [member for member in DataType if member not in (DataType.BYTES, DataType.BF16)], ids=str
)
def test_every_datatype(tmp_path: Path, datatype: DataType) -> None:
    class Echo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone()

    rows = np.ones((2, 2), datatype.numpy)
    artefact = export(tmp_path / "model.pt2", Echo(), (torch.from_numpy(rows),))
    backend, context = PyTorchBackend(), make_context(artefact)
    signature = backend.inspect(context)
    assert signature.inputs == (TensorSpec("x", datatype, (2, 2)),)
    answer = backend.load(context, signature).execute({"x": rows})["OUTPUT__0"]
    assert answer.dtype == rows.dtype
    np.testing.assert_array_equal(answer, rows)


def test_complex_tensors_are_refused(tmp_path: Path) -> None:
    artefact = export(tmp_path / "model.pt2", Pair(), (torch.zeros(2, 2, dtype=torch.complex64),))
    with pytest.raises(ModelLoadError, match=r"'x' is torch\.complex64, which the V2 protocol cannot carry"):
        PyTorchBackend().inspect(make_context(artefact))


def test_torchscript_without_configuration_says_what_to_write(tmp_path: Path) -> None:
    artefact = script(tmp_path / "model.pt", Linear())
    with pytest.raises(ModelLoadError) as raised:
        PyTorchBackend().inspect(make_context(artefact))
    text = str(raised.value)
    assert 'input [ { name: "image" data_type: TYPE_FP32' in text
    assert '{ name: "scale" data_type' in text and 'output [ { name: "OUTPUT__0"' in text


def test_torchscript_dictionary_goes_by_key(tmp_path: Path) -> None:
    artefact = script(tmp_path / "model.pt", Named())
    inputs = TestScripted.declared.inputs
    for name, is_there in (("best", True), ("worst", False)):
        declared = DeclaredSignature(inputs, (TensorSpec(name, DataType.INT64, ()),), 4)
        backend, context = PyTorchBackend(), make_context(artefact, declared=declared)
        instance = backend.load(context, backend.inspect(context))
        rows = {"image": np.ones((2, 4), np.float32), "scale": np.ones((2, 1), np.float32)}
        if is_there:
            assert list(instance.execute(rows)) == ["best"]
        else:
            with pytest.raises(ModelExecutionError, match="no 'worst', only scores, best"):
                instance.execute(rows)


def test_optional_argument(tmp_path: Path) -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
            return x if bias is None else x + bias

    artefact = script(tmp_path / "model.pt", Optional())
    x, bias = TensorSpec("x", DataType.FP32, (2,)), TensorSpec("bias", DataType.FP32, (2,), optional=True)
    declared = DeclaredSignature((x, bias), (TensorSpec("y", DataType.FP32, (2,)),), 4)
    backend, context = PyTorchBackend(), make_context(artefact, declared=declared)
    instance = backend.load(context, backend.inspect(context))
    ones = np.ones((1, 2), np.float32)
    assert instance.execute({"x": ones})["y"].tolist() == [[1, 1]]
    assert instance.execute({"x": ones, "bias": ones})["y"].tolist() == [[2, 2]]
    required = DeclaredSignature((TensorSpec("x", DataType.FP32, (2,), optional=True),), declared.outputs, 4)
    with pytest.raises(ModelLoadError, match="'x' is declared optional, but forward requires it"):
        backend.inspect(make_context(artefact, declared=required))


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("import sys; sys.modules['torch_pickle_went_off'] = sys",)


def test_state_dict_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    torch.save({"weights": Bomb()}, tmp_path / "model.pt")
    with pytest.raises(ModelLoadError, match=r"not a TorchScript file .*a state_dict"):
        PyTorchBackend().inspect(make_context(tmp_path / "model.pt"))
    assert "torch_pickle_went_off" not in sys.modules


def test_pickle_hidden_in_an_export_is_refused(tmp_path: Path) -> None:
    plain = export(tmp_path / "plain.pt2", Pair(), (torch.zeros(2, 2),))
    bomb = io.BytesIO()
    torch.save(Bomb(), bomb)
    artefact = tmp_path / "model.pt2"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(artefact, "w") as target:
        for name in source.namelist():
            target.writestr(name, bomb.getvalue() if "sample_inputs" in name else source.read(name))
    with pytest.raises(ModelLoadError, match=r"pickled objects.*allow_code is off"):
        PyTorchBackend().inspect(make_context(artefact))
    assert "torch_pickle_went_off" not in sys.modules


def test_missing_gpu_is_seen_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    artefact = export(tmp_path / "model.pt2", Pair(), (torch.zeros(2, 2),))
    device = f"cuda:{torch.cuda.device_count()}"
    backend, context = PyTorchBackend(), make_context(artefact, device=device)
    instance = backend.load(context, backend.inspect(context))
    assert isinstance(instance, TorchInstance) and instance.device == "cpu"
    assert f"asked for {device} but runs on the CPU" in caplog.text
    strict = make_context(artefact, device=device, parameters={"require_gpu": "true"})
    with pytest.raises(ModelLoadError, match=f"device {device} is required"):
        backend.load(strict, backend.inspect(strict))
    vague = make_context(artefact, device=device, parameters={"require_gpu": "maybe"})
    with pytest.raises(ModelLoadError, match="'require_gpu' must be"):
        backend.load(vague, backend.inspect(vague))


def test_threads_are_set_where_the_batches_run(tmp_path: Path) -> None:
    artefact = export(tmp_path / "model.pt2", Pair(), (torch.zeros(2, 2),))
    backend, context = PyTorchBackend(), make_context(artefact, threads=3)
    before = torch.get_num_threads()
    try:
        instance = backend.load(context, backend.inspect(context))
        assert torch.get_num_threads() == 3
        torch.set_num_threads(1)
        instance.execute({"x": np.ones((2, 2), np.float32)})
        assert torch.get_num_threads() == 1  # nothing to claim: it is the thread that loaded the instance
    finally:
        torch.set_num_threads(before)


def test_outputs_of_odd_strides_are_contiguous(tmp_path: Path) -> None:
    class Transposed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.t()

    artefact = export(tmp_path / "model.pt2", Transposed(), (torch.zeros(2, 3),))
    backend, context = PyTorchBackend(), make_context(artefact)
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    answer = backend.load(context, backend.inspect(context)).execute({"x": rows})["OUTPUT__0"]
    assert answer.flags.c_contiguous
    np.testing.assert_array_equal(answer, rows.T)
