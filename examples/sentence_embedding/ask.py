"""Embeds the lines of a file, or of standard input, and shows which two are most alike.

python examples/sentence_embedding/ask.py localhost:8001 < lines.txt
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton

MOST_ROWS = 32


def embed(client: Any, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Unit vectors [texts, 384]."""
    vectors = []
    for at in range(0, len(texts), MOST_ROWS):
        rows = np.array([[text.encode()] for text in texts[at : at + MOST_ROWS]], np.object_)
        tensor = triton.InferInput("text", rows.shape, "BYTES")
        tensor.set_data_from_numpy(rows)
        vectors.append(client.infer("sentence_embedding", [tensor]).as_numpy("embedding"))
    return np.concatenate(vectors)


def main(address: str) -> None:
    """The command line."""
    texts = [line.strip() for line in sys.stdin if line.strip()]
    vectors = embed(triton.InferenceServerClient(address), texts)
    likeness = vectors @ vectors.T - 2 * np.eye(len(texts))
    one, other = np.unravel_index(likeness.argmax(), likeness.shape)
    print(f"{likeness[one, other]:.3f}\n  {texts[one]}\n  {texts[other]}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "localhost:8001")
