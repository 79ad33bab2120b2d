"""Which artefact is opened by which backend."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import ModelLoadError
from aiorch_server.repository.artefacts import choose_artefact
from aiorch_server.repository.base import BackendNames

NAMES = BackendNames(
    artefacts={
        "model.onnx": "onnxruntime",
        "model.pt2": "pytorch",
        "model.pt": "pytorch",
        "model.savedmodel": "tensorflow",
        "model.keras": "tensorflow",
        "model.py": "python",
    },
    platforms={"onnxruntime_onnx": "onnxruntime", "pytorch_libtorch": "pytorch"},
)


def choose(folder: Path, present: list[str], **config: str) -> tuple[str, str]:
    for name in present:
        (folder / name).touch()
    artefact = choose_artefact(folder, ModelConfig.from_dict(config, folder="m"), NAMES)
    return artefact.path.relative_to(folder.parent).as_posix().removeprefix(f"{folder.name}/"), artefact.backend


@pytest.mark.parametrize(
    ("present", "config", "expected"),
    [
        (["model.onnx"], {}, ("model.onnx", "onnxruntime")),
        (["notes.txt", "model.py"], {}, ("model.py", "python")),
        (["model.pt", "model.pt2"], {}, ("model.pt2", "pytorch")),
        (["model.pt", "model.onnx"], {"backend": "pytorch"}, ("model.pt", "pytorch")),
        (["model.pt", "model.onnx"], {"platform": "onnxruntime_onnx"}, ("model.onnx", "onnxruntime")),
        (["model.pt"], {"platform": "pytorch_libtorch", "backend": "pytorch"}, ("model.pt", "pytorch")),
        (["model.onnx"], {"platform": "my_own", "backend": "onnxruntime"}, ("model.onnx", "onnxruntime")),
        (["a.onnx", "model.onnx"], {"default_model_filename": "a.onnx"}, ("a.onnx", "onnxruntime")),
        (["model.keras"], {"default_model_filename": "model.keras"}, ("model.keras", "tensorflow")),
        (["x.bin"], {"default_model_filename": "x.bin", "backend": "python"}, ("x.bin", "python")),
        ([], {"backend": "identity"}, ("1", "identity")),
        (["model.onnx"], {"backend": "identity"}, ("1", "identity")),
    ],
)
def test_the_artefact_and_its_backend(
    tmp_path: Path, present: list[str], config: dict[str, str], expected: tuple[str, str]
) -> None:
    folder = tmp_path / "1"
    folder.mkdir()
    assert choose(folder, present, **config) == expected


@pytest.mark.parametrize(
    ("present", "config", "expected"),
    [
        ([], {}, "no artefact of any installed backend in {folder}: looked for model.onnx, "),
        ([], {}, "found nothing. Rename the artefact, or set default_model_filename and backend"),
        (["digits.onnx"], {}, "found digits.onnx"),
        (["digits.onnx"], {"backend": "onnxruntime"}, "no artefact of backend 'onnxruntime' in {folder}"),
        ([f"{i:02}" for i in range(20)], {}, "found 00, 01, 02, 03, 04, 05, 06, 07 and 12 more"),
        (["model.onnx", "model.py"], {}, "artefacts of several backends (model.onnx, model.py); set 'backend' to one"),
        ([], {"default_model_filename": "a.onnx"}, "default_model_filename 'a.onnx' is not in {folder}, which holds"),
        (["a.bin"], {"default_model_filename": "a.bin"}, "artefact 'a.bin' in {folder} fits no installed backend"),
        (["a"], {"default_model_filename": "a"}, "fits no installed backend; set 'backend'"),
        (["model.onnx"], {"platform": "tensorrt_plan"}, "platform 'tensorrt_plan' belongs to no installed backend"),
        (["model.pt"], {"platform": "pytorch_libtorch", "backend": "python"}, "belongs to backend 'pytorch', but"),
    ],
)
def test_what_cannot_be_chosen_says_what_is_there(
    tmp_path: Path, present: list[str], config: dict[str, str], expected: str
) -> None:
    folder = tmp_path / "1"
    folder.mkdir()
    with pytest.raises(ModelLoadError) as caught:
        choose(folder, present, **config)
    assert expected.format(folder=folder) in str(caught.value)
