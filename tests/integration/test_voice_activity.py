"""The example `voice_activity`: several speakers streamed through the server at once, against the network offline."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
from served import Served, serve

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "voice_activity"
SENTENCES = {
    "en": "Good morning. This is a test of the voice detector, with a sentence that is rather long.",
    "de": "Guten Tag, hier spricht der zweite Sprecher.",
    "fr": "Bonjour à tous, je suis la troisième voix.",
    "es": "Buenos días. Uno, dos, tres.",
    "en+f3": "And somebody else speaks here at the same time.",
}


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"voice_activity_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PREPARE, LISTEN = load("prepare"), load("listen")
GRAPH = ROOT / ".cache" / "tests" / "silero_vad.onnx"


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Chunks by file: a second of silence, spoken words, a second of silence."""
    folder = tmp_path_factory.mktemp("speech")
    spoken = {}
    silence = np.zeros((31, LISTEN.CHUNK), np.float32)
    for voice, sentence in SENTENCES.items():
        path = folder / f"{voice}.wav"
        subprocess.run(["espeak-ng", "-v", voice, "-w", str(path), sentence], check=True, timeout=60)
        spoken[str(path)] = np.concatenate([silence, LISTEN.read_chunks(path), silence])
    return spoken


@pytest.fixture(scope="module", params=["oldest", "direct"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    config = PREPARE.CONFIG
    if request.param == "direct":
        oldest = next(line for line in config.splitlines() if line.strip().startswith("oldest"))
        config = config.replace(oldest, "  direct { max_queue_delay_microseconds: 1000 minimum_slot_utilization: 0.1 }")
    repository = tmp_path_factory.mktemp("voice") / "models"
    PREPARE.prepare(repository, GRAPH, config)
    with serve(repository) as running:
        yield running
        assert running.end() == 0
        assert "Traceback" not in running.log.read_text()


def detect_offline(chunks: Any) -> Any:
    """The published graph by itself, as its authors drive it."""
    session = onnxruntime.InferenceSession(str(PREPARE.fetch_graph(GRAPH)), providers=["CPUExecutionProvider"])
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros((1, PREPARE.CONTEXT), np.float32)
    found = []
    for chunk in chunks:
        given = np.concatenate([context, chunk[None]], axis=1)
        output, state = session.run(None, {"input": given, "state": state, "sr": np.array(PREPARE.RATE)})
        context = given[:, -PREPARE.CONTEXT :]
        found.append(output.item())
    return np.array(found, np.float32)


async def test_streamed_is_offline(served: Served, speakers: dict[str, Any]) -> None:
    async with triton_grpc_aio.InferenceServerClient(served.grpc) as client:
        found = await asyncio.gather(*(LISTEN.listen(client, name, chunks) for name, chunks in speakers.items()))
    for (name, chunks), probabilities in zip(speakers.items(), found, strict=True):
        offline = detect_offline(chunks)
        np.testing.assert_allclose(probabilities, offline, atol=2e-5, rtol=0, err_msg=name)
        # it is a voice detector: quiet before and at the end, speech in between
        assert offline[:20].max() < 0.2 < 0.9 < offline[35:].max()
        assert offline[-10:].max() < 0.2
    with triton_grpc.InferenceServerClient(served.grpc) as plain:
        (statistics,) = plain.get_inference_statistics("voice_activity").model_stats
    assert statistics.inference_stats.success.count == sum(map(len, speakers.values()))
    assert max(each.batch_size for each in statistics.batch_stats) > 1
    assert statistics.execution_count < statistics.inference_stats.success.count


def test_the_script(served: Served, speakers: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "listen.py"), served.grpc, *speakers],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == list(speakers)
    assert all("####" in line for line in lines)
