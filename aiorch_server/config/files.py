"""Finds and reads the configuration file in a model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import ModelLoadError

CONFIG_FILES = ("config.pbtxt", "config.yaml")
#: Names that look like a configuration but are not read; silence about them would mislead.
MISTAKEN_FILES = ("config.yml", "config.json", "config.textproto")
LARGEST_CONFIG_BYTES = 4 * 1024 * 1024
LARGEST_LABELS_BYTES = 16 * 1024 * 1024


def find_config_file(folder: Path) -> Path | None:
    """The configuration file of a model, or None; ModelLoadError where two are there or one is misnamed."""
    found = [folder / name for name in CONFIG_FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise ModelLoadError(f"both {found[0].name} and {found[1].name} are in {folder}; keep one of them")
    mistaken = [name for name in MISTAKEN_FILES if (folder / name).is_file()]
    if mistaken and not found:
        raise ModelLoadError(f"{folder / mistaken[0]} is not read; name it config.yaml or config.pbtxt")
    return found[0] if found else None


def read_config_file(path: Path) -> dict[str, Any]:
    """The fields written in a ``config.pbtxt`` or ``config.yaml``; ModelLoadError with file, line and column."""
    text = _read_text(path, LARGEST_CONFIG_BYTES)
    if path.suffix == ".pbtxt":
        # Only models that use the format pay for protobuf's import.
        from aiorch_server.config.pbtxt import read_pbtxt

        return read_pbtxt(text, str(path))
    from aiorch_server.config.strict_yaml import read_yaml  # as above, of the parser

    try:
        return read_yaml(text, str(path))
    except ValueError as error:
        raise ModelLoadError(str(error)) from None


def load_model_config(folder: Path, name: str = "") -> ModelConfig:
    """The configuration in a model's folder, or an empty one where no file is; ``name`` defaults to the folder's.

    Raises ModelLoadError with all problems.
    """
    path = find_config_file(folder)
    data = read_config_file(path) if path is not None else {}
    return ModelConfig.from_dict(data, folder=name or folder.name, source=str(path) if path is not None else "")


def read_labels(folder: Path, config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The labels of each output that names a label file: one per line; ModelLoadError where it cannot be read."""
    return {
        output.name: tuple(_read_text(folder / output.label_filename, LARGEST_LABELS_BYTES).splitlines())
        for output in config.output
        if output.label_filename
    }


def _read_text(path: Path, largest: int) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > largest:
        raise ModelLoadError(f"{path} is larger than {largest} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelLoadError(f"{path} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}") from None
