"""Tells where in WAV files somebody speaks; all files at once, each a sequence on a stream of its own.

espeak-ng -w hello.wav "Good morning. Is anybody there?"
python examples/voice_activity/listen.py 127.0.0.1:8001 hello.wav [MORE.wav ...]
"""

from __future__ import annotations

import asyncio
import sys
import wave
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc.aio as triton

CHUNK, RATE = 512, 16000
Samples = npt.NDArray[np.float32]


def read_chunks(path: Path) -> Samples:
    """A 16-bit WAV file as chunks of 32 ms at 16 kHz, one channel, padded with silence."""
    with wave.open(str(path)) as file:
        assert file.getsampwidth() == 2, f"{path}: {8 * file.getsampwidth()} bits, 16 are needed"
        raw = np.frombuffer(file.readframes(file.getnframes()), np.int16).reshape(-1, file.getnchannels())
        seconds, rate = len(raw) / file.getframerate(), file.getframerate()
    samples = raw.mean(axis=1) / 32768.0
    at = np.arange(int(seconds * RATE)) / RATE
    resampled = np.interp(at, np.arange(len(samples)) / rate, samples).astype(np.float32)
    return np.pad(resampled, (0, -len(resampled) % CHUNK)).reshape(-1, CHUNK)


async def listen(client: Any, name: str, chunks: Samples) -> Samples:
    """The probability of speech in each chunk; the server keeps what the detector remembers."""

    async def send() -> AsyncIterator[dict[str, Any]]:
        for index, chunk in enumerate(chunks):
            tensor = triton.InferInput("chunk", [1, CHUNK], "FP32")
            tensor.set_data_from_numpy(chunk[None])
            yield {
                "model_name": "voice_activity", "inputs": [tensor], "sequence_id": name,
                "sequence_start": index == 0, "sequence_end": index == len(chunks) - 1,
            }  # fmt: skip

    found = []
    async for result, error in client.stream_infer(send()):
        if error is not None:
            raise error
        found.append(result.as_numpy("probability").item())
    return np.array(found, np.float32)


async def main(target: str, paths: list[Path]) -> None:
    async with triton.InferenceServerClient(target) as client:
        chunks = [read_chunks(path) for path in paths]
        found = await asyncio.gather(
            *(listen(client, str(path), each) for path, each in zip(paths, chunks, strict=True))
        )
    for path, probabilities in zip(paths, found, strict=True):
        print(f"{path}: {''.join('#' if each > 0.5 else '.' for each in probabilities)}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], [Path(name) for name in sys.argv[2:]]))
