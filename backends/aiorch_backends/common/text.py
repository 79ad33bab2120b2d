"""BYTES tensors for frameworks whose strings are text: UTF-8 both ways."""

from __future__ import annotations

import numpy as np

from aiorch_server.errors import RequestError
from aiorch_server.types import NumpyArray


def decode_text(array: NumpyArray, name: str) -> NumpyArray:
    """An ``object`` array of ``bytes`` as one of ``str``, same shape; RequestError where the bytes are not UTF-8."""
    texts = np.empty(array.size, dtype=np.object_)
    elements: list[bytes] = array.ravel().tolist()
    for index, element in enumerate(elements):
        try:
            texts[index] = element.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RequestError(
                f"input '{name}', element {index}: not UTF-8 text ({error.reason} at byte {error.start})"
            ) from None
    return texts.reshape(array.shape)


def encode_text(array: NumpyArray) -> NumpyArray:
    """An array of ``str`` or ``bytes`` (kinds U, S, O) as an ``object`` array of ``bytes``, same shape.

    Raises TypeError for an element that is neither.
    """
    encoded = np.empty(array.size, dtype=np.object_)
    for index, element in enumerate(array.ravel().tolist()):
        if isinstance(element, str):
            encoded[index] = element.encode("utf-8")
        elif isinstance(element, bytes):
            encoded[index] = element
        else:
            raise TypeError(f"element {index} is a {type(element).__name__}; BYTES takes bytes or str")
    return encoded.reshape(array.shape)
