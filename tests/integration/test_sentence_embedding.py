"""The example `sentence_embedding`: the ensemble answers as the same network in torch, and its steps form batches."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from running_site import Site
from tokenizers import Tokenizer
from tritonclient.utils import InferenceServerException

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "sentence_embedding"
PARTS = ROOT / ".cache" / "tests" / "minilm"
TEXTS = (
    "A cat sits on the mat.",
    "There is a kitten on a rug.",
    "The central bank raised its rates.",
    "",
    "Zürich liegt an der Limmat 🙂",
    "word " * 200,
)


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"sentence_embedding_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PREPARE, ASK = load("prepare"), load("ask")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("sentences")
    PREPARE.prepare(root, PARTS)
    backends = ("identity:IdentityBackend", "python:PythonBackend", "onnxruntime:OnnxRuntimeBackend")
    site = Site(root, io_threads=1, execution={"backends": [f"aiorch_backends.{each}" for each in backends]})
    yield site
    site.close()


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[Any]:
    client = triton.InferenceServerClient(site.target)
    yield client
    client.close()


@pytest.fixture(scope="module")
def expected() -> np.ndarray[Any, Any]:
    """The published tokenizer and weights in torch, pooled as the network's card says."""
    tokenizer = Tokenizer.from_file(str(PARTS / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(length=64)
    found = tokenizer.encode_batch(list(TEXTS))
    ids, mask = (torch.tensor([getattr(each, name) for each in found]) for name in ("ids", "attention_mask"))
    with torch.inference_mode():
        states = PREPARE.load_encoder(PARTS / "model.safetensors")(ids, mask)
    weights = mask.unsqueeze(-1).float()
    mean = (states * weights).sum(1) / weights.sum(1)
    vectors: np.ndarray[Any, Any] = torch.nn.functional.normalize(mean, dim=1).numpy()
    return vectors


def test_a_text_that_is_none_is_refused_by_the_tokenizer_in_the_ensembles_name(client: Any) -> None:
    tensor = triton.InferInput("text", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[b"\xff\xfe"]], np.object_))
    with pytest.raises(InferenceServerException) as caught:
        client.infer("sentence_embedding", [tensor], request_id="7")
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert caught.value.message().startswith("in ensemble 'sentence_embedding', ")
    assert "input 'text' is not UTF-8" in caught.value.message()


def test_the_ensemble_answers_as_the_plain_pipeline(client: Any, expected: np.ndarray[Any, Any]) -> None:
    vectors = ASK.embed(client, TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=2e-5)
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.5 > likeness[0, 2]


def test_single_texts_share_batches_in_each_step(site: Site, client: Any, expected: np.ndarray[Any, Any]) -> None:
    n_requests = 60

    async def ask() -> list[Any]:
        async with triton_aio.InferenceServerClient(site.target) as client:

            async def one(text: str) -> Any:
                tensor = triton.InferInput("text", [1, 1], "BYTES")
                tensor.set_data_from_numpy(np.array([[text.encode()]], np.object_))
                return (await client.infer("sentence_embedding", [tensor])).as_numpy("embedding")[0]

            return await asyncio.gather(*(one(TEXTS[index % len(TEXTS)]) for index in range(n_requests)))

    steps = [name for name in PREPARE.CONFIGS if name != "sentence_embedding"]
    before = {name: client.get_inference_statistics(name).model_stats[0] for name in steps}
    vectors = asyncio.run(ask())
    for index, vector in enumerate(vectors):
        np.testing.assert_allclose(vector, expected[index % len(TEXTS)], atol=2e-5)
    for name in steps:
        after = client.get_inference_statistics(name).model_stats[0]
        assert after.inference_count == before[name].inference_count + n_requests
        # how many depends on the machine; that requests of one text each were run together does not
        assert after.execution_count - before[name].execution_count < n_requests, name
