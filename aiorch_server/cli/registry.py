"""``aiorch registry``: the tables of the registry's database, for whoever upgrades it by hand."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aiorch_server.cli.output import CommandError, ExitCode, Json, Output, UsageError
from aiorch_server.config.load import load_server_config
from aiorch_server.errors import AiorchError, CapacityError, InvalidSettings

if TYPE_CHECKING:
    from aiorch_server.registry.upgrade import SchemaCheck


class RegistryAction(enum.StrEnum):
    """What to do with the tables."""

    UPGRADE = "upgrade"
    CHECK = "check"


def registry(
    action: Annotated[RegistryAction, typer.Argument(help="upgrade: to this version; check: only look.")],
    url: Annotated[
        str | None,
        typer.Option("--registry", metavar="URL", help="The database; else as `aiorch serve` finds it."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="The server's configuration file, YAML or TOML.")
    ] = None,
    json: Json = False,
) -> None:
    """Brings the registry's tables to this version, or says how they are; a server that starts does so by itself.

    Exit code 1 where they are not of this version.
    """
    output = Output(json)
    with output.guard():
        found = _run(action, url, config)
        is_fine = action is RegistryAction.UPGRADE or found.state.value == "current"
        was = found.revision or "empty"
        if action is RegistryAction.UPGRADE:
            text = f"at {found.head}" if was == found.head else f"upgraded from {was} to {found.head}"
        else:
            text = f"{found.state}: at {was}, this version needs {found.head}"
        output.show({"state": found.state.value, "revision": found.revision, "head": found.head}, text)
        if not is_fine:
            raise typer.Exit(ExitCode.REFUSED)


def _run(action: RegistryAction, url: str | None, config: Path | None) -> SchemaCheck:
    try:
        settings = load_server_config({"registry": url}, file=config).registry
        if not settings.is_enabled:
            raise UsageError("no registry is given: add --registry URL, such as sqlite:///aiorch.db")
        try:
            from aiorch_server.registry.upgrade import check_schema, upgrade_schema
        except ModuleNotFoundError as error:
            text = f"{error.name} is missing: pip install 'aiorchestrator[admin]'"
            raise CommandError(text, ExitCode.REFUSED) from None
        address = settings.url.get_secret_value()
        return upgrade_schema(address) if action is RegistryAction.UPGRADE else check_schema(address)
    except InvalidSettings as error:
        raise UsageError(str(error)) from None
    except AiorchError as error:
        code = ExitCode.UNREACHABLE if isinstance(error, CapacityError) else ExitCode.REFUSED
        raise CommandError(str(error), code) from None
