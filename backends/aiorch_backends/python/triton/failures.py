"""Errors as Triton's models see and make them."""

from __future__ import annotations

from typing import Final

from aiorch_server.errors import AiorchError, Code, error_from_code


class TritonModelException(Exception):
    """What the utilities raise, and what a model may raise itself."""


class TritonError:
    """An error as an answer: a text and a code."""

    UNKNOWN: Final = 0
    INTERNAL: Final = 1
    NOT_FOUND: Final = 2
    INVALID_ARG: Final = 3
    UNAVAILABLE: Final = 4
    UNSUPPORTED: Final = 5
    ALREADY_EXISTS: Final = 6
    CANCELLED: Final = 7

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        if code not in _CODES:
            raise TypeError(
                f"TritonError takes one of its own codes, for example TritonError.INVALID_ARG, not {code!r}"
            )
        self._message = str(message)
        self._code = code

    def __repr__(self) -> str:
        return f"TritonError({self._message!r}, {self._code})"

    def code(self) -> int:
        """One of the codes of this class."""
        return self._code

    def message(self) -> str:
        """The text."""
        return self._message


_CODES: Final = {
    TritonError.UNKNOWN: Code.UNKNOWN,
    TritonError.INTERNAL: Code.INTERNAL,
    TritonError.NOT_FOUND: Code.NOT_FOUND,
    TritonError.INVALID_ARG: Code.INVALID_ARGUMENT,
    TritonError.UNAVAILABLE: Code.UNAVAILABLE,
    TritonError.UNSUPPORTED: Code.UNIMPLEMENTED,
    TritonError.ALREADY_EXISTS: Code.ALREADY_EXISTS,
    TritonError.CANCELLED: Code.CANCELLED,
}
_NUMBERS: Final = {code: number for number, code in _CODES.items()}


def to_server_error(error: TritonError) -> AiorchError:
    """The server's error for a model's."""
    return error_from_code(_CODES[error.code()], error.message())


def to_triton_error(error: AiorchError) -> TritonError:
    """A model's error for the server's; codes that Triton has not become INTERNAL."""
    return TritonError(str(error), _NUMBERS.get(error.code, TritonError.INTERNAL))
