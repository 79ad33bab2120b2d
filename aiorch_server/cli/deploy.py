"""``aiorch deploy``, ``canary``, ``undeploy``, ``scale`` and ``traffic``: what should run."""

from __future__ import annotations

from typing import Annotated

import typer
from aiorch_client.admin import AdminClient, CanaryStep, Deployment, Gates, RolloutPlan, Strategy, TrafficTarget

from aiorch_server.cli.admin import admin_command, describe
from aiorch_server.cli.connection import ClientOutput
from aiorch_server.cli.following import follow, render_deployment
from aiorch_server.cli.output import UsageError
from aiorch_server.cli.reference import ModelName, Reference, check_model_name, parse_number, parse_reference

Instances = Annotated[int, typer.Option(min=0, help="Per server; 0: as it is, or as the model's configuration says.")]
OnDemand = Annotated[bool, typer.Option("--on-demand", help="Load with the first request, unload when idle.")]
Generation = Annotated[int, typer.Option("--expected-generation", min=0, help="Only if nobody changed it since.")]
Wait = Annotated[bool, typer.Option("--wait", "-w", help="Stay until it has ended; exit code 1 if it failed.")]
WaitSecs = Annotated[float, typer.Option("--wait-secs", min=1, max=31_536_000, help="Longest time to stay.")]
BakeSecs = Annotated[float | None, typer.Option(min=0, help="How long each step, or both versions, are watched.")]
ErrorRate = Annotated[float | None, typer.Option(min=0, max=1, help="Gate: errors per request, at most.")]
P99Ratio = Annotated[float | None, typer.Option(min=0, help="Gate: its p99 over the stable version's, at most.")]
Agreement = Annotated[float | None, typer.Option(min=0, max=1, help="Gate: answers that agree, at least.")]
Atol = Annotated[float, typer.Option("--atol", min=0, help="Numbers agree that differ by atol + rtol * |stable|.")]
Rtol = Annotated[float, typer.Option("--rtol", min=0, help="See --atol.")]
Samples = Annotated[int, typer.Option("--min-samples", min=0, help="Answers before a latency counts; 0: 200.")]
MaxWait = Annotated[float, typer.Option("--max-wait-secs", min=0, help="Go on with fewer samples then; 0: never.")]
Manual = Annotated[bool, typer.Option("--manual-rollback", help="Pause at a breach, rather than go back.")]
Step = Annotated[list[str] | None, typer.Option("--step", help="PERCENT or PERCENT:SECS; repeatable.")]
Sample = Annotated[float, typer.Option("--sample-percent", min=0, max=100, help="Requests compared; 0: 10.")]
Candidate = Annotated[float, typer.Option("--candidate-percent", min=0, max=100, help="ab: keys; 0: 50.")]

_STEP_BAKE_S = 60.0


@admin_command
def deploy(
    client: AdminClient,
    output: ClientOutput,
    reference: Reference,
    strategy: Annotated[
        str, typer.Option(metavar="replace|blue-green|canary|shadow|ab", help="How it takes the old version's place.")
    ] = "replace",
    step: Step = None,
    bake_secs: BakeSecs = None,
    max_error_rate: ErrorRate = None,
    max_p99_ratio: P99Ratio = None,
    min_agreement: Agreement = None,
    atol: Atol = 0.0,
    rtol: Rtol = 0.0,
    min_samples: Samples = 0,
    max_wait_secs: MaxWait = 0.0,
    sample_percent: Sample = 0.0,
    candidate_percent: Candidate = 0.0,
    manual_rollback: Manual = False,
    instances: Instances = 0,
    on_demand: OnDemand = False,
    expected_generation: Generation = 0,
    wait: Wait = False,
    wait_secs: WaitSecs = 3600.0,
) -> None:
    """Serves a version: the first one of a model at once, a further one by a strategy."""
    chosen = _parse_strategy(strategy)
    if step and chosen is not Strategy.CANARY:
        raise UsageError("--step is for --strategy canary")
    plan = RolloutPlan(
        chosen,
        _parse_steps(step or [], bake_secs) if chosen is Strategy.CANARY else (),
        Gates(max_error_rate, max_p99_ratio, min_agreement, atol, rtol, min_samples, max_wait_secs),
        bake_s=bake_secs or 0.0,
        sample_percent=sample_percent,
        candidate_percent=candidate_percent,
        is_rollback_manual=manual_rollback,
    )
    _begin(client, output, reference, plan, instances, on_demand, expected_generation, wait_secs if wait else None)


@admin_command
def canary(
    client: AdminClient,
    output: ClientOutput,
    reference: Reference,
    step: Step = None,
    bake_secs: BakeSecs = None,
    max_error_rate: ErrorRate = 0.01,
    max_p99_ratio: P99Ratio = 1.5,
    min_agreement: Agreement = None,
    atol: Atol = 0.0,
    rtol: Rtol = 0.0,
    min_samples: Samples = 0,
    max_wait_secs: MaxWait = 0.0,
    sample_percent: Sample = 0.0,
    manual_rollback: Manual = False,
    instances: Instances = 0,
    expected_generation: Generation = 0,
    wait: Wait = False,
    wait_secs: WaitSecs = 3600.0,
) -> None:
    """Rolls a version out in steps, each of which must pass the gates: deploy --strategy canary with gates."""
    plan = RolloutPlan(
        Strategy.CANARY,
        _parse_steps(step or [], bake_secs),
        Gates(max_error_rate, max_p99_ratio, min_agreement, atol, rtol, min_samples, max_wait_secs),
        sample_percent=sample_percent,
        is_rollback_manual=manual_rollback,
    )
    _begin(client, output, reference, plan, instances, False, expected_generation, wait_secs if wait else None)


def _begin(
    client: AdminClient,
    output: ClientOutput,
    reference: str,
    plan: RolloutPlan,
    instances: int,
    is_on_demand: bool,
    expected_generation: int,
    wait_secs: float | None,
) -> None:
    named = parse_reference(reference)
    deployment = client.deploy(
        named.model,
        named.version,
        alias=named.alias,
        plan=plan,
        instances=instances,
        is_on_demand=is_on_demand,
        expected_generation=expected_generation,
    )
    if wait_secs is None:
        _show(output, deployment)
    else:
        follow(client, output, deployment, wait_secs)


@admin_command
def undeploy(client: AdminClient, output: ClientOutput, model: ModelName) -> None:
    """Takes all versions of a model out of service, drained."""
    client.undeploy(check_model_name(model))
    output.show({"undeployed": model}, f"{model} is taken out of service")


@admin_command
def scale(
    client: AdminClient,
    output: ClientOutput,
    model: ModelName,
    instances: Annotated[int, typer.Argument(min=0, help="Per server; 0: as the model's configuration says.")],
    expected_generation: Generation = 0,
) -> None:
    """Changes the number of a model's instances."""
    _show(output, client.scale(check_model_name(model), instances, expected_generation=expected_generation))


@admin_command
def traffic(
    client: AdminClient,
    output: ClientOutput,
    model: ModelName,
    shares: Annotated[list[str], typer.Argument(metavar="VERSION=PERCENT...", help="Such as 1=90 2=10.")],
    expected_generation: Generation = 0,
) -> None:
    """Sets by hand how requests that name no version are shared between versions."""
    targets = [_parse_share(share) for share in shares]
    total = sum(target.percent for target in targets)
    if abs(total - 100) > 1e-6:
        raise UsageError(f"the shares add up to {total:g} percent; expected 100")
    _show(output, client.set_traffic(check_model_name(model), targets, expected_generation=expected_generation))


def _show(output: ClientOutput, deployment: Deployment) -> None:
    output.show({"deployment": describe(deployment)}, *render_deployment(deployment))


def _parse_strategy(text: str) -> Strategy:
    known = [each.value for each in Strategy if each is not Strategy.UNSPECIFIED]
    if text not in known:
        raise UsageError(f"--strategy {text}: expected one of {', '.join(known)}")
    return Strategy(text)


def _parse_steps(texts: list[str], bake_secs: float | None) -> tuple[CanaryStep, ...]:
    steps = []
    for text in texts:
        percent, colon, bake = text.partition(":")
        seconds = parse_number(bake.removesuffix("s"), "--step") if colon else bake_secs
        steps.append(CanaryStep(parse_number(percent, "--step"), _STEP_BAKE_S if seconds is None else seconds))
    if bake_secs is not None and not texts:
        # the server's own steps have times of their own
        steps = [CanaryStep(percent, bake_secs) for percent in (1.0, 10.0, 50.0)]
    return tuple(steps)


def _parse_share(text: str) -> TrafficTarget:
    version, separator, percent = text.partition("=")
    if not separator or not (version.isascii() and version.isdecimal()):
        raise UsageError(f"'{text}' is no share: expected VERSION=PERCENT, such as 2=10")
    return TrafficTarget(int(version), parse_number(percent.removesuffix("%"), text))
