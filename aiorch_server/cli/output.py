"""What the commands write, and the exit codes they end with.

People get short texts and tables; with ``--json`` standard output carries JSON documents, one a line, and nothing else.
Errors go to standard error as text, with ``--json`` to standard output as ``{"error": {...}}``. What a terminal or a
table needs of rich is imported then: a server that writes to a file does without.
"""

from __future__ import annotations

import base64
import enum
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Json = Annotated[bool, typer.Option("--json", help="Write JSON, one document a line.")]
STATE_STYLES = {"READY": "green", "LOADING": "yellow", "UNLOADING": "yellow", "UNAVAILABLE": "red"}
_FILE_COLUMNS = 200
_WIDEST_TABLE = 1000


class ExitCode(enum.IntEnum):
    """How a command ended."""

    OK = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    #: 128 + SIGINT, as shells have it.
    INTERRUPTED = 130


class CommandError(Exception):
    """A failure to tell the user; ``str(error)`` says what would be right, ``code`` and ``reason`` are for programs."""

    def __init__(self, text: str, exit_code: ExitCode, code: str = "", reason: str = "") -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.code = code or exit_code.name
        self.reason = reason


class UsageError(CommandError):
    """The command line asks for what cannot be."""

    def __init__(self, text: str) -> None:
        super().__init__(text, ExitCode.USAGE)


class Output:
    """Writes a command's results for a person or, where ``is_json``, for a program."""

    def __init__(self, is_json: bool) -> None:
        self.is_json = is_json
        self.is_terminal = sys.stdout.isatty()

    @cached_property
    def console(self) -> Console:
        """Where people see tables, colours and progress."""
        from rich.console import Console

        # Tables in files and pipes are not squeezed into the 80 columns of a terminal that is not there.
        return Console(highlight=False, width=None if self.is_terminal else _FILE_COLUMNS)

    def show(self, document: Mapping[str, Any], *people: RenderableType) -> None:
        """Writes ``document`` as a line of JSON, or ``people`` to the terminal."""
        if self.is_json:
            typer.echo(json.dumps(to_json(document), allow_nan=False))
        else:
            for part in people:
                if isinstance(part, str) and not self.is_terminal:
                    typer.echo(part)
                else:
                    self._render(part)

    def _render(self, part: RenderableType) -> None:
        from rich.console import Console
        from rich.measure import Measurement
        from rich.table import Table
        from rich.text import Text

        if isinstance(part, Table):
            # A narrow terminal may break the lines; names that are cut off could not be told apart.
            unbounded = self.console.options.update(max_width=_WIDEST_TABLE)
            width = Measurement.get(self.console, unbounded, part).maximum
            Console(highlight=False, width=max(width, self.console.width)).print(part)
            return
        # Pasted lines and messages of servers must not be broken up or read as markup.
        self.console.print(Text(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str | Text))

    def fail(self, text: str, code: str, reason: str = "") -> None:
        """Writes an error."""
        if self.is_json:
            told = {"code": code, "text": text, **({"reason": reason} if reason else {})}
            typer.echo(json.dumps({"error": told}))
        else:
            from rich.console import Console
            from rich.text import Text

            Console(stderr=True, highlight=False).print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turns expected failures within into a text and the exit code for them."""
        try:
            yield
        except CommandError as error:
            self.fail(str(error), error.code, error.reason)
            raise typer.Exit(error.exit_code) from None


def write_reasons(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each model that has something to say; a column would leave no room for the others."""
    return [
        f"{model['name']} {model['version']}".strip() + f": {model['reason']}" for model in models if model["reason"]
    ]


def to_json(value: Any) -> Any:
    """``value`` with what JSON lacks replaced: NaN and infinities by their names, bytes by text or base64.

    Times are written as in ISO 8601.
    """
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    return value
