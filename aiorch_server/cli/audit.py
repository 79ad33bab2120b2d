"""``aiorch audit``: what was done, and whether the log of it holds."""

from __future__ import annotations

from datetime import datetime
from itertools import islice
from typing import Annotated

import typer
from aiorch_client.admin import AdminClient

from aiorch_server.cli.admin import add_row, admin_command, describe, make_table, show_time
from aiorch_server.cli.connection import ClientOutput
from aiorch_server.cli.output import CommandError, ExitCode, UsageError

group = typer.Typer(no_args_is_help=True, help="Shows what was done, and checks that the log of it was not changed.")

Time = Annotated[str, typer.Option(metavar="TIME", help="Such as 2026-01-31T12:00; this machine's zone unless given.")]


@group.command("list")
@admin_command
def list_entries(
    client: AdminClient,
    output: ClientOutput,
    principal: Annotated[str, typer.Option(help="Only what this caller did.")] = "",
    model: Annotated[str, typer.Option(help="Only what was done to this model.")] = "",
    method: Annotated[str, typer.Option(help="Only calls of this method, /aiorch.admin.v1.Deployments/Deploy.")] = "",
    since: Time = "",
    until: Time = "",
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="The newest so many.")] = 50,
) -> None:
    """Lists entries, the newest first."""
    found = client.query_audit(
        principal=principal,
        model=model,
        method=method,
        since=_parse_time(since, "--since"),
        until=_parse_time(until, "--until"),
    )
    entries = list(islice(found, limit))
    table = make_table("number", "time", "principal", "method", "model", "outcome", "server", numbers=("number",))
    for each in entries:
        method_name = each.method.rpartition("/")[2]
        cells = (each.principal, method_name, each.model, each.outcome, each.server)
        add_row(table, each.number, show_time(each.time), *cells)
    output.show({"entries": [describe(each) for each in entries]}, table if entries else "no entries")


@group.command("verify")
@admin_command
def verify(
    client: AdminClient,
    output: ClientOutput,
    known_number: Annotated[int, typer.Option(min=0, help="An entry whose hash was written down elsewhere.")] = 0,
    known_hash: Annotated[str, typer.Option(help="That hash.")] = "",
) -> None:
    """Computes the chain of hashes anew; exit code 1 where it is broken."""
    if bool(known_number) != bool(known_hash):
        raise UsageError("--known-number and --known-hash come together")
    check = client.verify_audit(known_number=known_number, known_hash=known_hash)
    if not check.is_intact:
        output.show({"check": describe(check)})
        where = f" at entry {check.broken_at}" if check.broken_at else ""
        raise CommandError(f"the audit log is broken{where}: {check.reason}", ExitCode.REFUSED, "BROKEN")
    told = f"{check.entries:,} entries, unbroken; the hash of the last one, to be kept elsewhere: {check.head_hash}"
    output.show({"check": describe(check)}, told)


def _parse_time(text: str, option: str) -> datetime | None:
    if not text:
        return None
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        raise UsageError(f"{option} {text}: expected a time such as 2026-01-31T12:00") from None
