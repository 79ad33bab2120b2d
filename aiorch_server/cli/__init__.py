"""The command line ``aiorch``.

Exit codes: 0 fine, 1 the server (or, for ``serve``, the machine) said no, or a rollout did not succeed, 2 the command
line is wrong, 3 no server can be reached, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Final

import typer
from typer.core import TyperCommand

from aiorch_server.cli.sections import SectionedCommand

_SERVING: Final = "Serve and ask"
_ROLLOUTS: Final = "Deploy and roll out"
_REGISTRY: Final = "Registry, access, audit"
#: The commands by panel of the help, each with the module of this package that has a function of its name; of a group
#: the module has the Typer application ``group``.
_PANELS: Final[Mapping[str, Mapping[str, str]]] = MappingProxyType(
    {
        _SERVING: {
            "init": "init",
            "serve": "serve",
            "status": "status",
            "infer": "infer",
            "bench": "bench",
            "tune": "tune",
            "record": "record",
            "version": "version",
        },
        _ROLLOUTS: {
            "deploy": "deploy",
            "canary": "deploy",
            "undeploy": "deploy",
            "scale": "deploy",
            "traffic": "deploy",
            "promote": "rollout",
            "rollback": "rollout",
            "pause": "rollout",
            "resume": "rollout",
            "abort": "rollout",
            "history": "rollout",
            "watch": "rollout",
            "objective": "objective",
            "explain": "explain",
        },
        _REGISTRY: {"model": "model", "access": "access", "audit": "audit", "registry": "registry"},
    }
)
_GROUPS: Final = frozenset({"model", "access", "audit", "objective"})
#: So many options that their help has sections.
_LONG: Final = frozenset({"serve"})
COMMANDS: Final = tuple(name for panel in _PANELS.values() for name in panel)


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
    wanted = frozenset(commands)
    for panel, names in _PANELS.items():
        for name, module in names.items():
            if name in wanted:
                found = importlib.import_module(f"{__name__}.{module}")
                if name in _GROUPS:
                    app.add_typer(found.group, name=name, rich_help_panel=panel)
                else:
                    shape = SectionedCommand if name in _LONG else TyperCommand
                    app.command(name, cls=shape, rich_help_panel=panel)(getattr(found, name))
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
    try:
        app = build_app(asked or COMMANDS)
    except KeyboardInterrupt:
        sys.exit(130)
    app(prog_name="aiorch")
