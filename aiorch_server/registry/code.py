"""Whether loading a version may run code of its author's choice: unless it is known not to.

What the backends open without running any: ONNX graphs, and skops files whose types nobody declared trusted. So
everything else counts as code: Python, pickles in any wrapping, TorchScript and exported programs, TensorFlow graphs,
what chooses another backend, and what is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from aiorch_server.config.files import CONFIG_FILES, LARGEST_CONFIG_BYTES
from aiorch_server.errors import ModelLoadError, RequestError

_INERT_ARTEFACTS = frozenset({".onnx", ".skops"})
_INERT_BACKENDS = frozenset({"", "onnxruntime", "onnxruntime_onnx", "sklearn", "identity", "ensemble"})
_CODE = frozenset(
    {
        *(".py", ".pyc", ".pyo", ".pyx", ".pth", ".so", ".dll", ".dylib", ".sh", ".whl"),
        *(".pkl", ".pickle", ".dill", ".joblib", ".npy", ".npz", ".ckpt"),
        *(".pt", ".pt2", ".mar", ".torchscript", ".savedmodel", ".pb", ".keras", ".h5", ".hdf5"),
        *(".jar", ".zip", ".tar", ".gz"),
    }
)
#: Pickles of protocol 2 and later, shared objects, archives (PyTorch's are zip files of pickles), scripts.
_CODE_MARKS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x7fELF", b"#!")
_ZIP_MARK = b"PK"
#: How much of a file's beginning is looked at.
MARK_BYTES = 4


def read_config(name: str, content: bytes) -> Mapping[str, Any]:
    """The fields in the configuration file ``name``; RequestError with line and column where it cannot be read."""
    if len(content) > LARGEST_CONFIG_BYTES:
        raise RequestError(f"{name} in the archive is larger than {LARGEST_CONFIG_BYTES} bytes")
    try:
        text = content.decode("utf-8-sig")
        if name.endswith(".pbtxt"):
            # Only configurations in this format pay for protobuf's import.
            from aiorch_server.config.pbtxt import read_pbtxt

            return read_pbtxt(text, name)
        from aiorch_server.config.strict_yaml import read_yaml

        return read_yaml(text, name)
    except UnicodeDecodeError:
        raise RequestError(f"{name} in the archive is not UTF-8 text") from None
    except (ModelLoadError, ValueError, RecursionError) as error:
        raise RequestError(f"the configuration in the archive cannot be read: {error}") from None


def has_code(config: Mapping[str, Any], beginnings: Iterable[tuple[str, bytes]]) -> bool:
    """Whether these files (path in the version, first bytes) with this configuration may run code when loaded."""
    files = [(PurePosixPath(path), beginning) for path, beginning in beginnings if path not in CONFIG_FILES]
    for path, beginning in files:
        is_packed = beginning.startswith(_ZIP_MARK) and path.suffix != ".skops"
        suffixes = {suffix.lower() for part in path.parts for suffix in PurePosixPath(part).suffixes}
        if suffixes & _CODE or is_packed or beginning.startswith(_CODE_MARKS):
            return True
    if (
        str(config.get("backend") or "") not in _INERT_BACKENDS
        or str(config.get("platform") or "") not in _INERT_BACKENDS
    ):
        return True
    # types that an author declares trusted are called when the file is opened, libraries of operators are loaded
    if "trusted_types" in (config.get("parameters") or {}) or config.get("model_operations"):
        return True
    if config.get("ensemble_scheduling") is not None or config.get("backend") == "identity":
        return False
    chosen = str(config.get("default_model_filename") or "")
    artefacts = [chosen] if chosen else [path.name for path, _ in files if path.stem == "model"]
    return not artefacts or any(PurePosixPath(name).suffix not in _INERT_ARTEFACTS for name in artefacts)
