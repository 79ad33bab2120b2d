"""``aiorch record``: when requests for a model come and how many rows they have, as a trace for ``aiorch tune``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from aiorch_client.admin import AdminClient, RecordedTraffic
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from aiorch_server.cli.admin import admin_command
from aiorch_server.cli.connection import ClientOutput
from aiorch_server.cli.output import CommandError, ExitCode, UsageError
from aiorch_server.cli.reference import ModelName, check_model_name
from aiorch_server.optimizer.arrivals import Trace


@admin_command
def record(
    client: AdminClient,
    output: ClientOutput,
    model: ModelName,
    target: Annotated[Path, typer.Option("--output", "-o", help="The trace: .npz or .csv. What is there is replaced.")],
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, max=3600, help="How long.")] = 60.0,
    version: Annotated[int, typer.Option("--version", min=0, help="0: the one that requests without one go to.")] = 0,
) -> None:
    """Records when requests for a model come and how many rows they have; never what is in them."""
    _check_target(target)
    parts: list[RecordedTraffic] = []
    is_whole = True
    with _progress(output, seconds) as tell:
        try:
            for part in client.record_traffic(check_model_name(model), seconds, version=version):
                parts.append(part)
                tell(len(part.times_ns))
        except KeyboardInterrupt:
            if not parts:
                raise
            is_whole = False
    trace = Trace(
        np.concatenate([np.asarray(each.times_ns, np.int64) for each in parts]),
        np.concatenate([np.asarray(each.rows, np.int64) for each in parts]),
    )
    try:
        trace.save(target)
    except OSError as error:
        raise CommandError(f"--output {target}: {error.strerror}", ExitCode.REFUSED) from error
    lost = sum(each.lost for each in parts)
    told = {"model": model, "version": parts[0].version, "requests": len(trace), "rows": int(trace.rows.sum())}
    output.show(
        {"recording": {**told, "lost": lost, "file": str(target)}},
        f"{target}: {len(trace):,} requests, {told['rows']:,} rows of {model}:{parts[0].version}",
        *([f"{lost:,} more came faster than they were read"] if lost else []),
    )
    if not is_whole:
        raise CommandError(f"interrupted; {target} has what came until then", ExitCode.INTERRUPTED)


def _check_target(target: Path) -> None:
    """Before an hour is spent: UsageError where no trace can be written."""
    if target.suffix not in (".npz", ".csv"):
        raise UsageError(f"--output {target}: a trace is an .npz or a .csv")
    try:
        if target.exists():
            with target.open("ab"):
                pass
        else:
            with tempfile.TemporaryFile(dir=target.parent):
                pass
    except OSError as error:
        raise UsageError(f"--output {target}: {error.strerror}") from error


@contextmanager
def _progress(output: ClientOutput, seconds: float) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    quiet = output.is_json or not output.is_terminal
    begun_s, came = time.monotonic(), 0
    with Progress(*columns, console=output.console, transient=True, disable=quiet) as progress:
        task = progress.add_task("recording", total=seconds)

        def tell(more: int) -> None:
            nonlocal came
            came += more
            progress.update(task, description=f"{came:,} requests", completed=time.monotonic() - begun_s)

        yield tell
