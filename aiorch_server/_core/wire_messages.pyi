from collections.abc import Mapping, Sequence
from typing import TypedDict

from typing_extensions import Buffer

class ScannedRequest(TypedDict):
    is_plain: bool
    model_name: bytes
    model_version: bytes
    id: bytes
    priority: int
    timeout_us: int
    inputs: list[tuple[bytes, bytes, tuple[int, ...], bytes]]
    outputs: list[bytes]

def scan(message: Buffer) -> ScannedRequest: ...
def walk_elements(data: Buffer, limit: int) -> tuple[int, int]: ...
def encode_request(
    name: str,
    version: str,
    id: str,
    inputs: Sequence[tuple[str, str, Sequence[int], Buffer]],
    outputs: Sequence[str] = ...,
) -> bytes: ...
def encode_parameters(parameters: Mapping[str, bool | int | float | str]) -> bytes: ...
def decode_response(
    message: Buffer,
) -> tuple[str, str, str, list[tuple[str, str, tuple[int, ...], memoryview]]]: ...
