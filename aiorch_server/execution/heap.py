"""Giving memory back that loading a model has left behind."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def _find_trim() -> Callable[[int], int]:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # not glibc: other allocators give back by themselves
        return lambda pad: 0
    return trim


_trim = _find_trim()


def trim_heap() -> None:
    """Gives free memory inside the heap back to the system, without the interpreter lock; for after a load or unload.

    Frameworks parse and optimize a model in memory of several times its size. What they free lies between blocks that
    stay, where glibc keeps it (malloc_trim(3)): 20 MB behind an ONNX file of 2.7 MB.
    """
    _trim(0)
