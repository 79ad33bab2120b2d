"""A rollout as it goes: shown while it goes on, and how it ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiorch_client import UnavailableError
from aiorch_client.admin import AdminClient, Deployment, DeploymentState, Rollout, RolloutState, Strategy
from rich.table import Table
from rich.text import Text

from aiorch_server.cli.admin import add_row, describe, make_table, show_time
from aiorch_server.cli.connection import ClientOutput
from aiorch_server.cli.output import CommandError, ExitCode

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

STATE_STYLES = {
    RolloutState.SUCCEEDED: "green",
    RolloutState.ROLLED_BACK: "red",
    RolloutState.FAILED: "red",
    RolloutState.ABORTED: "yellow",
    RolloutState.PAUSED: "yellow",
}


def follow(client: AdminClient, output: ClientOutput, deployment: Deployment, wait_secs: float) -> None:
    """Waits for the end of what ``deployment`` began, and shows it; CommandError where it did not succeed."""
    rollout = deployment.rollout
    if rollout is None or rollout.state.is_end:
        _follow_deployment(client, output, deployment.model, wait_secs)
        return
    show = RolloutView(output)
    try:
        with show:
            ended = client.wait(rollout, timeout_s=wait_secs, on_look=show.update)
    except KeyboardInterrupt:
        raise CommandError(f"interrupted; {_say_goes_on(output, rollout)}", ExitCode.INTERRUPTED) from None
    except UnavailableError as error:
        text = f"{error.details}; {_say_goes_on(output, rollout)}"
        raise CommandError(text, ExitCode.REFUSED, error.code.name, error.reason) from None
    finish(output, ended)


def finish(output: ClientOutput, rollout: Rollout, wanted: RolloutState = RolloutState.SUCCEEDED) -> None:
    """Shows how a rollout ended; CommandError where that is not as it was ``wanted``."""
    undecided = [_say_undecided(output, rollout)] if rollout.is_undecided else []
    output.show({"rollout": describe(rollout)}, *render_rollout(rollout), *undecided)
    if rollout.is_undecided and rollout.state is RolloutState.RUNNING:
        return  # as it was asked for
    if rollout.state is not wanted:
        text = f"version {rollout.to_version} of {rollout.model} was not rolled out: {_write_end(rollout)}"
        raise CommandError(text, ExitCode.REFUSED, rollout.state.value.upper().replace("-", "_"))


def _follow_deployment(client: AdminClient, output: ClientOutput, model: str, wait_secs: float) -> None:
    try:
        ready = client.wait_ready(model, timeout_s=wait_secs)
    except KeyboardInterrupt:
        text = f"interrupted; the deployment goes on: {output.write_command('status', model)} shows it"
        raise CommandError(text, ExitCode.INTERRUPTED) from None
    output.show({"deployment": describe(ready)}, *render_deployment(ready))
    if ready.state is DeploymentState.DEGRADED:
        raise CommandError(f"{model} does not serve everywhere: {ready.reason}", ExitCode.REFUSED, "DEGRADED")
    if ready.rollout is not None and ready.rollout.is_undecided:  # begun since
        finish(output, ready.rollout)


def _write_end(rollout: Rollout) -> str:
    return f"{rollout.state.value}{f', {rollout.reason}' if rollout.reason else ''}"


def _say_undecided(output: ClientOutput, rollout: Rollout) -> str:
    verbs = ("promote", "abort") if rollout.state is RolloutState.RUNNING else ("resume", "promote", "abort")
    commands = [output.write_command(verb, rollout.model) for verb in verbs]
    return f"it stays so until somebody decides: {' or '.join(commands)}"


def _say_goes_on(output: ClientOutput, rollout: Rollout) -> str:
    status, abort = (output.write_command(verb, rollout.model) for verb in ("status", "abort"))
    return f"rollout {rollout.id} goes on: {status} shows it, {abort} goes back to version {rollout.from_version}"


class RolloutView:
    """A rollout under way: a picture that changes at a terminal, elsewhere a line per change, nothing with JSON."""

    def __init__(self, output: ClientOutput) -> None:
        self._output = output
        self._live: Live | None = None
        self._told = ""

    def __enter__(self) -> RolloutView:
        if self._output.is_terminal and not self._output.is_json:
            from rich.live import Live

            self._live = Live(console=self._output.console, transient=True, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, rollout: Rollout) -> None:
        """Shows it as it is now."""
        if self._live is not None:
            from rich.console import Group

            self._live.update(Group(*render_rollout(rollout)))
        elif not self._output.is_json and not rollout.state.is_end:  # the end is shown by ``finish``
            line = write_progress(rollout)
            if line != self._told:
                self._output.show({}, line)
            self._told = line


def write_progress(rollout: Rollout) -> str:
    """Where a rollout stands, in a line."""
    steps = rollout.plan.steps
    where = ""
    has_told = rollout.reason.startswith("step ")
    if rollout.plan.strategy is Strategy.CANARY and steps and not rollout.state.is_end and not has_told:
        percent = steps[min(rollout.step, len(steps) - 1)].percent
        where = f", step {rollout.step + 1} of {len(steps)}: {percent:g} % to version {rollout.to_version}"
    reason = f", {rollout.reason}" if rollout.reason else ""
    return f"{rollout.model} {_write_way(rollout)}: {rollout.state.value}{where}{reason}"


def _write_way(rollout: Rollout) -> str:
    way = f"{rollout.from_version} -> {rollout.to_version}" if rollout.from_version else f"-> {rollout.to_version}"
    return f"{way} by {rollout.plan.strategy.value}"


def render_rollout(rollout: Rollout) -> list[RenderableType]:
    """A rollout with what was measured of both versions."""
    line = Text(write_progress(rollout))
    style = STATE_STYLES.get(rollout.state)
    if style is not None:
        line.highlight_words([rollout.state.value], style)
    parts: list[RenderableType] = [line]
    if rollout.reports:
        parts.append(_tabulate_reports(rollout))
    parts += [f"  differs: {each}" for each in rollout.disagreements]
    return parts


def _tabulate_reports(rollout: Rollout) -> Table:
    table = make_table(
        "", "version", "samples", "errors", "p50 ms", "p99 ms", "agreed",
        numbers=("version", "samples", "errors", "p50 ms", "p99 ms", "agreed"),
    )  # fmt: skip
    for report in rollout.reports:
        role = "  candidate" if report.version == rollout.to_version else "  stable"
        agreed = f"{report.agreed / report.compared:.2%}" if report.compared else ""
        counts = (report.version, f"{report.requests:,}", f"{report.errors:,}")
        add_row(table, role, *counts, f"{report.p50_ms:.3f}", f"{report.p99_ms:.3f}", agreed)
    return table


def tabulate_rollouts(rollouts: list[Rollout]) -> Table:
    """Rollouts with their ends."""
    table = make_table("model", "way", "state", "began", "ended", "by", "reason")
    for each in rollouts:
        state = Text(each.state.value, STATE_STYLES.get(each.state, ""))
        times = (show_time(each.began_at), show_time(each.ended_at))
        add_row(table, each.model, _write_way(each), state, *times, each.began_by, each.reason)
    return table


def tabulate_deployments(deployments: list[Deployment]) -> Table:
    """What should run, and whether it does."""
    columns = ("deployed", "version", "traffic", "instances", "state", "rollout", "by")
    table = make_table(*columns, numbers=("version", "instances"))
    styles = {DeploymentState.READY: "green", DeploymentState.DEGRADED: "red", DeploymentState.PROGRESSING: "yellow"}
    for each in deployments:
        traffic = " ".join(f"{target.version}={target.percent:g}%" for target in each.traffic)
        rollout = "" if each.rollout is None else each.rollout.state.value
        state = Text(each.state.value, styles.get(each.state, ""))
        add_row(table, each.model, each.version, traffic, each.instances or "", state, rollout, each.updated_by)
    return table


def render_deployment(deployment: Deployment) -> list[RenderableType]:
    """A deployment with what each server made of it, and its rollout."""
    parts: list[RenderableType] = [tabulate_deployments([deployment])]
    if deployment.reason:
        parts.append(f"{deployment.model}: {deployment.reason}")
    if deployment.servers:
        table = make_table(
            "server", "generation", "version", "state", "seen", "reason", numbers=("generation", "version")
        )
        for server in deployment.servers:
            seen = show_time(server.seen_at)
            for status in server.versions:
                generation = f"{server.observed_generation} of {deployment.generation}"
                add_row(table, server.server, generation, status.version, status.state, seen, status.reason)
        parts.append(table)
    if deployment.rollout is not None:
        parts += render_rollout(deployment.rollout)
    return parts
