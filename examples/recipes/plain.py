"""identity_fp32 (for benchmarks) and text_length (a model in Python): no framework, no training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

IDENTITY_CONFIG = """\
name: "identity_fp32"
backend: "identity"
max_batch_size: 64
input [ { name: "INPUT0" data_type: TYPE_FP32 dims: [ 4 ] } ]
output [ { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 4 ] } ]
dynamic_batching { }
"""

TEXT_LENGTH = '''\
"""How many characters each text has."""

import numpy as np
from aiorch_server.errors import RequestError


class Model:
    inputs = [("text", "BYTES", [1])]
    outputs = [("length", "INT32", [1])]
    max_batch_size = 64

    def execute(self, inputs):
        try:
            lengths = [[len(text.decode())] for text in inputs["text"][:, 0]]
        except UnicodeDecodeError as error:
            raise RequestError(f"input 'text' is not UTF-8: {error}") from None
        return {"length": np.array(lengths, dtype=np.int32)}
'''
TEXTS = ("", "plain", "two words", "Zürich", "東京都", "🙂", "a" * 5000, "line\nbreak")


def main(models: Path, references: Path) -> None:
    """Writes both models and what they must answer."""
    identity = models / "identity_fp32"
    (identity / "1").mkdir(parents=True)
    (identity / "config.pbtxt").write_text(IDENTITY_CONFIG)
    rows = np.random.default_rng(0).standard_normal((256, 4)).astype(np.float32)
    echoed: dict[str, Any] = {"input.INPUT0": rows, "output.OUTPUT0": rows}
    np.savez(references / "identity_fp32.npz", **echoed)

    artefact = models / "text_length" / "1" / "model.py"
    artefact.parent.mkdir(parents=True)
    artefact.write_text(TEXT_LENGTH)
    texts = np.array([[text.encode()] for text in TEXTS])
    lengths = np.array([[len(text)] for text in TEXTS], dtype=np.int32)
    counted: dict[str, Any] = {"input.text": texts, "output.length": lengths}
    np.savez(references / "text_length.npz", **counted)
    print("nothing to train")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
