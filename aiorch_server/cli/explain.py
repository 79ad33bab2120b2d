"""``aiorch explain``: where a model's knobs stand, and why."""

from __future__ import annotations

from collections.abc import Iterator

from aiorch_client.admin import AdminClient, Explanation
from rich.console import RenderableType

from aiorch_server.cli.admin import add_row, admin_command, describe, make_table, show_time
from aiorch_server.cli.connection import ClientOutput
from aiorch_server.cli.objective import write_objective
from aiorch_server.cli.reference import ModelName, check_model_name


@admin_command
def explain(client: AdminClient, output: ClientOutput, model: ModelName) -> None:
    """Shows why a model's knobs stand where they stand."""
    explanation = client.explain(check_model_name(model))
    output.show({"explanation": describe(explanation)}, *_render(explanation))


def _render(explanation: Explanation) -> Iterator[RenderableType]:
    if explanation.objective is None:
        yield f"{explanation.model} has no objective"
    else:
        yield from write_objective(explanation.objective)
    if explanation.knobs:
        knobs = make_table("knob", "now", numbers=("now",))
        for name, value in sorted(explanation.knobs.items()):
            add_row(knobs, name, f"{value:g}")
        yield knobs
    if not explanation.decisions:
        yield "nothing was moved yet"
        return
    table = make_table("time", "knob", "moved", "why", "effect")
    for each in explanation.decisions:
        add_row(table, show_time(each.time), each.knob, f"{each.before:g} -> {each.after:g}", each.reason, each.effect)
    yield table
