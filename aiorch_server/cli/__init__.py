"""The command line ``aiorch``.

Exit codes: 0 fine, 1 the server (or, for ``serve``, the machine) said no, 2 the command line is wrong, 3 no server can
be reached.
"""

from __future__ import annotations

from typing import Annotated

import typer

from aiorch_server.cli.bench import bench
from aiorch_server.cli.infer import infer
from aiorch_server.cli.serve import serve
from aiorch_server.cli.status import status
from aiorch_server.cli.version import version

app = typer.Typer(
    name="aiorch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        version()
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="The same as the command version.")
    ] = False,
) -> None:
    """AIOrchestrator: serves models over gRPC and REST, and talks to such servers."""


for command in (serve, status, infer, bench, version):
    app.command()(command)


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    app(prog_name="aiorch")
