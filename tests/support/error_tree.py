"""All errors of the server: what doors must be able to translate."""

from __future__ import annotations

from collections.abc import Iterator

from aiorch_server.errors import AiorchError


def walk(error: type[AiorchError]) -> Iterator[type[AiorchError]]:
    yield error
    for child in error.__subclasses__():
        yield from walk(child)


#: Without the classes that other tests define.
ERROR_TREE = [error for error in walk(AiorchError) if error.__module__ == "aiorch_server.errors"]
