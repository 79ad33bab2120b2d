"""Keys of requests, and answers as bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from aiorch_server import __version__
from aiorch_server.cache.base import EntryUnusable
from aiorch_server.types import InferenceRequest, InferenceResponse, Parameter, SequencePlace, Tensor

#: Parameters that say how a request is queued and written, not what is asked.
_NOT_ASKED: Final = frozenset(
    {"priority", "timeout", "headers", "binary_data_output", "triton_enable_empty_final_response"}
)
_DIGEST_BYTES: Final = 32
#: Entries of caches outside of this process begin with it.
_SEAL: Final = b"aiorch1\n"
_SEAL_BYTES: Final = 16


def hash_version(name: str, version: int, identity: str, config: Mapping[str, object]) -> bytes:
    """What keys of one version begin with: another configuration, artefact or server version gives another."""
    text = json.dumps([__version__, name, version, identity, config], sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()


def hash_steps(version: bytes, steps: Iterable[bytes]) -> bytes:
    """What keys of an ensemble begin with: ``version`` is its own hash, ``steps`` those of its models in one order."""
    return hashlib.blake2b(b"".join((version, *steps)), digest_size=_DIGEST_BYTES).digest()


def hash_request(
    version: bytes, request: InferenceRequest, sequence: SequencePlace, outputs: Collection[str] = ()
) -> bytes:
    """The key of a checked request: its inputs in any order, its own parameters, the outputs that it asks for.

    ``outputs`` are all that the model has: naming none means these, and the order of names means nothing, for answers
    have the model's order. Neither its id nor its priority and timeout count. Tensors go into the hash where they lie;
    what goes before them says how long each is, so that no two requests give the same bytes.
    """
    inputs = sorted(request.inputs, key=lambda tensor: tensor.name)
    contents = [memoryview(tensor.data or b"").cast("B") for tensor in inputs]
    head = [
        [
            [tensor.name, tensor.datatype, list(tensor.shape), data.nbytes]
            for tensor, data in zip(inputs, contents, strict=True)
        ],
        sorted((name, value) for name, value in request.parameters.items() if name not in _NOT_ASKED),
        sorted({output.name for output in request.outputs} or outputs),
        [sequence.correlation_id, sequence.is_start, sequence.is_end],
    ]
    text = json.dumps(head, ensure_ascii=True).encode()
    digest = hashlib.blake2b(version, digest_size=_DIGEST_BYTES)
    digest.update(len(text).to_bytes(8, "little"))
    digest.update(text)
    for data in contents:
        digest.update(data)
    return digest.digest()


def pack_answer(response: InferenceResponse) -> bytes:
    """Outputs and parameters of an answer as one block of bytes: a header in JSON, then the tensors."""
    contents = [memoryview(tensor.data or b"").cast("B") for tensor in response.outputs]
    outputs = [
        [tensor.name, tensor.datatype, list(tensor.shape), data.nbytes]
        for tensor, data in zip(response.outputs, contents, strict=True)
    ]
    head = json.dumps([dict(response.parameters), outputs], ensure_ascii=True).encode()
    return b"".join((len(head).to_bytes(8, "little"), head, *contents))


def unpack_answer(packed: bytes, name: str, version: str, request_id: str) -> InferenceResponse:
    """What ``pack_answer`` packed, as the answer to another request; tensors are views. ValueError for other bytes."""
    start = 8 + int.from_bytes(packed[:8], "little")
    parameters, outputs = _read_head(packed[8:start])
    whole = memoryview(packed)
    tensors = []
    for tensor, datatype, shape, size in outputs:
        tensors.append(Tensor(tensor, datatype, tuple(shape), whole[start : start + size]))
        start += size
    if start != len(packed):
        raise ValueError(f"a cached answer has {len(packed)} bytes instead of {start}")
    return InferenceResponse(name, version, tensors, request_id, parameters)


def seal(key: bytes, value: bytes) -> bytes:
    """``value`` with what tells later that it is whole, and was put under ``key``."""
    return b"".join((_SEAL, _hash_entry(key, value), value))


def unseal(key: bytes, sealed: bytes) -> bytes:
    """What ``seal`` got; EntryUnusable for anything else."""
    start = len(_SEAL) + _SEAL_BYTES
    value = sealed[start:]
    if sealed[: len(_SEAL)] != _SEAL or sealed[len(_SEAL) : start] != _hash_entry(key, memoryview(sealed)[start:]):
        raise EntryUnusable(f"an entry of {len(sealed)} bytes is not what was put there")
    return value


def _hash_entry(key: bytes, value: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(key, digest_size=_SEAL_BYTES)
    digest.update(value)
    return digest.digest()


def _read_head(text: bytes) -> tuple[dict[str, Parameter], Sequence[tuple[str, str, list[int], int]]]:
    parameters, outputs = json.loads(text)
    return parameters, outputs
