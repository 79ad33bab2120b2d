"""``aiorch objective``: what models should keep to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from aiorch_client import NotFoundError
from aiorch_client.admin import AdminClient, Objective

from aiorch_server.cli.admin import admin_command, describe
from aiorch_server.cli.connection import ClientOutput
from aiorch_server.cli.output import UsageError
from aiorch_server.cli.reference import ModelName, check_model_name

group = typer.Typer(no_args_is_help=True, help="Says what latency a model should keep to, and what that may take.")

Count = Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="0: not said.")]
_MEDIAN = "Half of the requests within it, such as 5ms."
_P95, _P99 = "95 of 100 requests within it.", "99 of 100 requests within it, such as 50ms."
_LATENCY = "--percentile of the requests within it; 0: no latency any more."
_TIME = re.compile(r"([0-9]+(?:\.[0-9]+)?)(us|ms|s)", re.ASCII)
_UNIT_US = {"us": 1.0, "ms": 1e3, "s": 1e6}
#: The server's word where the model is there, and its objective is not.
_WITHOUT = "NOT_FOUND_ERROR"


@group.command("show")
@admin_command
def show(client: AdminClient, output: ClientOutput, model: ModelName) -> None:
    """Shows what a model should keep to."""
    try:
        objective = client.get_objective(check_model_name(model))
    except NotFoundError as error:
        if error.reason == _WITHOUT:
            error.details += f"; {output.write_command('objective', 'set', model, '--p99', '50ms')} gives it one"
        raise
    _show(output, objective)


@group.command("set")
@admin_command
def set_(
    client: AdminClient,
    output: ClientOutput,
    model: ModelName,
    p50: Annotated[str, typer.Option(metavar="TIME", help=_MEDIAN)] = "",
    p95: Annotated[str, typer.Option(metavar="TIME", help=_P95)] = "",
    p99: Annotated[str, typer.Option(metavar="TIME", help=_P99)] = "",
    percentile: Annotated[float | None, typer.Option(min=0, max=100, help="For --latency, such as 99.9.")] = None,
    latency: Annotated[str, typer.Option(metavar="TIME", help=_LATENCY)] = "",
    error_budget: Annotated[str, typer.Option(metavar="PART", help="May miss it: 0.001 or 0.1%; 0: not said.")] = "",
    min_instances: Count = None,
    max_instances: Count = None,
    max_batch_size: Count = None,
    priority: Annotated[
        int | None, typer.Option(min=1 - 2**31, max=2**31 - 1, help="Higher goes first where the machine is short.")
    ] = None,
    instance_cost: Annotated[float | None, typer.Option(min=0, help="Of one instance, in your own unit.")] = None,
) -> None:
    """Sets what a model should keep to; what is not given stays."""
    told = {"--p50": p50, "--p95": p95, "--p99": p99, "--latency": latency}
    given = [option for option, text in told.items() if text]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: a model has one latency objective")
    latency_us = None
    if given:
        option = given[0]
        latency_us = _parse_latency_us(told[option], option)
        if option != "--latency":
            if percentile is not None:
                raise UsageError(f"{option} says the percentile itself: --percentile is for --latency")
            percentile = float(option.removeprefix("--p"))
    wanted: dict[str, Any] = {
        "percentile": percentile,
        "latency_us": latency_us,
        "error_budget": _parse_part(error_budget, "--error-budget") if error_budget else None,
        "min_instances": min_instances,
        "max_instances": max_instances,
        "max_batch_size": max_batch_size,
        "priority": priority,
        "instance_cost": instance_cost,
    }
    if all(value is None for value in wanted.values()):
        raise UsageError("nothing to set: give --p99 50ms, or another option of aiorch objective set --help")
    _show(output, client.set_objective(check_model_name(model), **wanted))


def _show(output: ClientOutput, objective: Objective) -> None:
    output.show({"objective": describe(objective)}, *write_objective(objective))


def write_objective(objective: Objective) -> Iterator[str]:
    """What it says, in lines."""
    latency = "no latency is said"
    if objective.latency_us:
        latency = f"{objective.percentile:g} % of requests within {_write_us(objective.latency_us)}"
    yield f"{objective.model}: {latency}"
    instances = [f"at least {objective.min_instances}"] if objective.min_instances else []
    instances += [f"at most {objective.max_instances}"] if objective.max_instances else []
    lines = {
        "error budget": f"{objective.error_budget * 100:.6g} % may miss it" if objective.error_budget else "",
        "instances": ", ".join(instances),
        "batch": f"at most {objective.max_batch_size}" if objective.max_batch_size else "",
        "priority": str(objective.priority) if objective.priority else "",
        "cost": f"{objective.instance_cost:g} per instance" if objective.instance_cost else "",
    }
    if told := [f"  {name:<13} {value}" for name, value in lines.items() if value]:
        yield "\n".join(told)


def _parse_latency_us(text: str, option: str) -> int:
    if text == "0":
        return 0
    found = _TIME.fullmatch(text)
    if found is None:
        raise UsageError(f"{option} {text}: expected a time with its unit, such as 50ms, 500us or 1.5s")
    latency_us = round(float(found[1]) * _UNIT_US[found[2]])
    if latency_us < 1:
        raise UsageError(f"{option} {text}: expected a microsecond or more")
    return latency_us


def _parse_part(text: str, option: str) -> float:
    try:
        part = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        part = -1.0
    if not 0 <= part <= 1:
        raise UsageError(f"{option} {text}: expected a part of the requests, such as 0.001 or 0.1%")
    return part


def _write_us(latency_us: int) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if latency_us >= size:
            return f"{latency_us / size:g} {unit}"
    return f"{latency_us} us"
