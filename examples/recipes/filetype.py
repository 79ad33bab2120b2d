"""filetype: magika's network, which names a file's type from its first and last bytes; served by onnxruntime."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np
import onnxruntime

CONFIG = """\
# Everything but the labels could be read from the file.
name: "filetype"
backend: "onnxruntime"
max_batch_size: 64
input [ { name: "bytes" data_type: TYPE_INT32 dims: [ 2048 ] } ]
output [ { name: "target_label" data_type: TYPE_FP32 dims: [ 214 ] label_filename: "labels.txt" } ]
dynamic_batching { }
"""
FILES_PER_TYPE = 24


def read_features(path: Path, half: int, padding: int, block: int) -> list[int]:
    """What the network sees: ``half`` bytes from each end without outer white space, padded in the middle."""
    content = path.read_bytes()
    front, back = content[:block].lstrip()[:half], content[-block:].rstrip()[-half:]
    return [*front, *[padding] * (half - len(front)), *[padding] * (half - len(back)), *back]


def list_files() -> list[tuple[Path, str]]:
    """Real files of this Python installation, with the type that their names promise."""
    library, site = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    wanted = [
        (sorted(library.glob("[a-t]*.py")), "python"),
        (sorted((library / "lib-dynload").glob("*.so")), "elf"),
        (sorted(library.glob("__pycache__/[a-t]*.pyc")), "pythonbytecode"),
        (sorted((site / "numpy").rglob("*.so")), "elf"),
    ]
    return [(path, kind) for paths, kind in wanted for path in paths[:FILES_PER_TYPE] if path.stat().st_size > 2048]


def main(models: Path, references: Path) -> None:
    """Copies the network, writes its labels, and asks ONNX Runtime about real files."""
    spec = importlib.util.find_spec("magika")
    assert spec is not None and spec.origin is not None
    source = max((Path(spec.origin).parent / "models").glob("standard_*"))
    settings = json.loads((source / "config.min.json").read_text())
    labels: list[str] = settings["target_labels_space"]
    folder = models / "filetype"
    (folder / "1").mkdir(parents=True)
    shutil.copyfile(source / "model.onnx", folder / "1" / "model.onnx")
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    (folder / "config.pbtxt").write_text(CONFIG)

    files = list_files()
    sizes = settings["beg_size"], settings["padding_token"], settings["block_size"]
    features = np.array([read_features(path, *sizes) for path, _ in files], dtype=np.int32)
    session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
    (scores,) = session.run(["target_label"], {"bytes": features})
    found = [labels[place] for place in scores.argmax(axis=1)]
    accuracy = float(np.mean([kind == wanted for kind, (_, wanted) in zip(found, files, strict=True)]))
    assert len(files) > FILES_PER_TYPE, "too few files to ask about"
    assert accuracy > 0.9, f"accuracy {accuracy:.3f} on {len(files)} files"
    np.savez(references / "filetype.npz", **{"input.bytes": features, "output.target_label": scores})
    print(f"accuracy {accuracy:.3f} on {len(files)} files")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
