"""Model repositories of ensembles: python models of a few lines, and configurations of their graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

#: (model, its inputs -> tensors, its outputs -> tensors), and the version where it matters.
Wiring = tuple[str, Mapping[str, str], Mapping[str, str]] | tuple[str, Mapping[str, str], Mapping[str, str], int]


def write_model(
    root: Path,
    name: str,
    code: str = "return {'Y': i['X'] * 2}",
    *,
    inputs: Sequence[str] = ("X",),
    outputs: Sequence[str] = ("Y",),
    datatype: str = "TYPE_FP32",
    dims: str = "[-1]",
    size: int = 8,
    more: str = "",
    before: str = "",
) -> None:
    """A python model whose ``execute(self, i)`` is ``code``; with ``before`` above its class."""
    folder = root / name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"        {line}\n" for line in code.splitlines())
    (folder / "model.py").write_text(f"{before}\nclass Model:\n    def execute(self, i):\n{lines}")
    (root / name / "config.pbtxt").write_text(
        f'backend: "python" max_batch_size: {size}\n{tensors("input", inputs, datatype, dims)}'
        f"{tensors('output', outputs, datatype, dims)}{more}\n"
    )


def tensors(field: str, names: Sequence[str], datatype: str = "TYPE_FP32", dims: str = "[-1]") -> str:
    return "".join(f'{field} {{ name: "{name}" data_type: {datatype} dims: {dims} }}\n' for name in names)


def write_steps(steps: Sequence[Wiring]) -> str:
    """The ``step`` entries of ensemble_scheduling."""
    text = ""
    for name, inputs, outputs, *version in steps:
        maps = "".join(f'input_map {{ key: "{key}" value: "{value}" }} ' for key, value in inputs.items())
        maps += "".join(f'output_map {{ key: "{key}" value: "{value}" }} ' for key, value in outputs.items())
        text += f'step {{ model_name: "{name}" model_version: {version[0] if version else -1} {maps}}}\n'
    return text


def write_ensemble(
    root: Path,
    name: str,
    steps: Sequence[Wiring],
    *,
    inputs: Sequence[str] = ("IN",),
    outputs: Sequence[str] = ("OUT",),
    datatype: str = "TYPE_FP32",
    dims: str = "[-1]",
    size: int = 8,
    more: str = "",
    scheduling: str = "",
) -> None:
    (root / name / "1").mkdir(parents=True, exist_ok=True)
    (root / name / "config.pbtxt").write_text(
        f'platform: "ensemble" max_batch_size: {size}\n{tensors("input", inputs, datatype, dims)}'
        f"{tensors('output', outputs, datatype, dims)}{more}\n"
        f"ensemble_scheduling {{ {write_steps(steps)} {scheduling} }}\n"
    )
