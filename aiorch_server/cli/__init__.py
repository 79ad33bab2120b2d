"""The command line ``aiorch``.

Exit codes: 0 fine, 1 the server (or, for ``serve``, the machine) said no, 2 the command line is wrong, 3 no server can
be reached.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Annotated, Final

import typer

#: Each is a module of this package with a function of the same name.
COMMANDS: Final = ("serve", "status", "infer", "bench", "registry", "version")


def build_app(commands: Iterable[str] = COMMANDS) -> typer.Typer:
    """The command line with these commands; only their modules are imported."""
    app = typer.Typer(
        name="aiorch",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"]},
    )
    app.callback()(_root)
    for name in commands:
        app.command()(getattr(importlib.import_module(f"{__name__}.{name}"), name))
    return app


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from aiorch_server.cli.version import version

        version()
        raise typer.Exit


def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="The same as the command version.")
    ] = False,
) -> None:
    """AIOrchestrator: serves models over gRPC and REST, and talks to such servers."""


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    # A server keeps what it imports: it does without the client that the other commands need.
    asked = [name for name in COMMANDS if name in sys.argv[1:2]]
    build_app(asked or COMMANDS)(prog_name="aiorch")
