"""What all backends do alike: name what they refuse, complete signatures, keep what ``inspect`` opened."""

from aiorch_backends.common.artefacts import (
    OpenedArtefacts,
    import_framework,
    is_set,
    locate,
    refuse,
    require_artefact,
)
from aiorch_backends.common.signatures import FoundTensor, complete_signature
from aiorch_backends.common.text import decode_text, encode_text

__all__ = [
    "FoundTensor",
    "OpenedArtefacts",
    "complete_signature",
    "decode_text",
    "encode_text",
    "import_framework",
    "is_set",
    "locate",
    "refuse",
    "require_artefact",
]
