"""``aiorch promote``, ``rollback``, ``pause``, ``resume``, ``abort``, ``history`` and ``watch``: on the way."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from typing import Annotated

import typer
from aiorch_client.admin import AdminClient, Event, Rollout, RolloutState

from aiorch_server.cli.admin import admin_command, describe, show_time
from aiorch_server.cli.connection import ClientOutput
from aiorch_server.cli.following import RolloutView, finish, render_rollout, tabulate_rollouts
from aiorch_server.cli.output import CommandError, ExitCode
from aiorch_server.cli.reference import ModelName, check_model_name

Reason = Annotated[str, typer.Option("--reason", "-m", help="Why, for those who look later.")]
Wait = Annotated[bool, typer.Option("--wait", "-w", help="Stay until it has ended; exit code 1 if it failed.")]
_WAIT_S = 3600.0
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


@admin_command
def promote(client: AdminClient, output: ClientOutput, model: ModelName, wait: Wait = False) -> None:
    """Ends the rollout under way with the new version: the steps that are left are left out."""
    _tell(client, output, client.promote(check_model_name(model)), wait)


@admin_command
def rollback(
    client: AdminClient, output: ClientOutput, model: ModelName, reason: Reason = "", wait: Wait = False
) -> None:
    """Goes back: ends the rollout under way with the old version, or without one deploys the version before."""
    _tell(client, output, client.rollback(check_model_name(model), reason=reason), wait)


def _tell(client: AdminClient, output: ClientOutput, rollout: Rollout, wait: bool) -> None:
    if not wait:
        _show(output, rollout)
        return
    view = RolloutView(output)
    try:
        with view:
            ended = client.wait(rollout, timeout_s=_WAIT_S, on_look=view.update)
    except KeyboardInterrupt:
        text = f"interrupted; it goes on: {output.write_command('status', rollout.model)} shows it"
        raise CommandError(text, ExitCode.INTERRUPTED) from None
    is_going_back = rollout.state in (RolloutState.ROLLING_BACK, RolloutState.ROLLED_BACK)
    finish(output, ended, RolloutState.ROLLED_BACK if is_going_back else RolloutState.SUCCEEDED)


@admin_command
def pause(client: AdminClient, output: ClientOutput, model: ModelName, reason: Reason = "") -> None:
    """Holds a rollout at its present step; its gates are still watched."""
    _show(output, client.pause(check_model_name(model), reason=reason))


@admin_command
def resume(client: AdminClient, output: ClientOutput, model: ModelName) -> None:
    """Goes on with a rollout that was paused."""
    _show(output, client.resume(check_model_name(model)))


@admin_command
def abort(client: AdminClient, output: ClientOutput, model: ModelName, reason: Reason = "") -> None:
    """Ends a rollout that is under way with the old version."""
    _show(output, client.abort(check_model_name(model), reason=reason))


def _show(output: ClientOutput, rollout: Rollout) -> None:
    output.show({"rollout": describe(rollout)}, *render_rollout(rollout))


@admin_command
def history(
    client: AdminClient,
    output: ClientOutput,
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Only its rollouts.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The newest so many.")] = 20,
) -> None:
    """Lists rollouts, the newest first, with how they ended and why."""
    models = [check_model_name(model)] if model else [each.name for each in client.list_models()]
    found = [each for name in models for each in islice(client.list_rollouts(name), limit)]
    rollouts = sorted(found, key=lambda each: each.began_at or _LONG_AGO, reverse=True)[:limit]
    shown = tabulate_rollouts(rollouts) if rollouts else "no rollouts"
    output.show({"rollouts": [describe(each) for each in rollouts]}, shown)


@admin_command
def watch(
    client: AdminClient,
    output: ClientOutput,
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Only what happens to it.")] = "",
    after: Annotated[
        int, typer.Option(min=-1, help="Begin behind this event; 0: with the oldest, -1: with what comes.")
    ] = -1,
    limit: Annotated[int, typer.Option(min=0, help="End after so many events; 0: at Ctrl-C.")] = 0,
) -> None:
    """Shows what happens, as it happens."""
    try:
        for count, event in enumerate(client.watch(check_model_name(model), after=after), 1):
            output.show(describe(event), _write_event(event))
            if count == limit:
                return
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None


def _write_event(event: Event) -> str:
    return f"{event.number:>6}  {show_time(event.time)}  {event.kind:<20}  {event.text} ({event.actor})"
