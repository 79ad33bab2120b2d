"""``aiorch bench``: load on one model, from this machine."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Annotated, Any

import grpc
import numpy as np
import typer
from aiorch_client import Client, InferRequest, RequestError
from aiorch_client.loadgen import (
    MODEL_INFER,
    MODEL_STREAM_INFER,
    Arrival,
    LoadPlan,
    LoadResult,
    TargetUnreachable,
    run_load,
)
from aiorch_client.loadgen.sequences import SequenceIds
from aiorch_client.messages import encode_infer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from aiorch_server.cli.connection import (
    DEFAULT_URL,
    ClientOutput,
    HeaderOption,
    TimeoutSecs,
    TlsCert,
    TlsKey,
    TlsRoot,
    TokenFile,
    Url,
    UseTls,
    make_tls,
    open_client,
    read_headers,
    read_token,
)
from aiorch_server.cli.infer import Model, ModelVersion
from aiorch_server.cli.output import CommandError, ExitCode, Json, Output, UsageError
from aiorch_server.cli.tensors import make_inputs, parse_shapes, read_inputs

#: Different messages sent in turn, so that no cache answers all of them from one.
_DIFFERENT_REQUESTS = 16


class MadeData(enum.StrEnum):
    """What to send where no input is given."""

    RANDOM = "random"
    ZEROS = "zeros"


def bench(
    model: Model,
    url: Url = DEFAULT_URL,
    concurrency: Annotated[
        int,
        typer.Option(
            "--concurrency", "-c", min=1, max=10_000, help="Callers of the closed loop, over all connections."
        ),
    ] = 1,
    connections: Annotated[int, typer.Option("--connections", min=1, max=1_000, help="Connections to share.")] = 1,
    rate: Annotated[
        float | None, typer.Option("--rate", min=0.001, max=1e7, help="Requests/s of an open loop instead of callers.")
    ] = None,
    arrival: Annotated[
        Arrival, typer.Option("--arrival", help="How an open loop spreads its requests.")
    ] = Arrival.POISSON,
    duration: Annotated[
        float, typer.Option("--duration", "-d", min=0.1, max=86_400, help="Seconds to measure.")
    ] = 10.0,
    warm_up: Annotated[float, typer.Option("--warm-up", min=0, max=3_600, help="Seconds of load beforehand.")] = 1.0,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", "-i", help="NAME=FILE or FILE, as for `aiorch infer`.")
    ] = None,
    data: Annotated[MadeData, typer.Option("--data", help="What to send where no --input is given.")] = MadeData.RANDOM,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, max=1_000_000, help="Rows of each request.")] = 1,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", help="NAME:D1,D2 for an input of open size, without the batch dimension."),
    ] = None,
    sequence_length: Annotated[
        int,
        typer.Option("--sequence-length", min=1, max=1_000_000, help="Requests of a stateful model's sequence."),
    ] = 10,
    model_version: ModelVersion = "",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of data and arrivals.")] = 0,
    timeout_secs: TimeoutSecs = 30.0,
    tls: UseTls = False,
    tls_root_cert: TlsRoot = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    header: HeaderOption = None,
    json: Json = False,
) -> None:
    """Measures a model under load: requests per second and latencies.

    Of a stateful model each caller sends sequences; of a decoupled one a request ends with its last answer.
    """
    output = ClientOutput(json)
    with output.guard():
        if concurrency % connections:
            raise UsageError(f"--concurrency {concurrency} must be a multiple of --connections {connections}")
        tls_config, token = make_tls(tls, tls_root_cert, tls_cert, tls_key), read_token(token_file)
        headers = read_headers(header)
        with open_client(url, timeout_s=timeout_secs, tls=tls_config, token=token, metadata=headers) as client:
            kind = _look_at(client, model, model_version)
            if kind.is_stateful and rate is not None:
                raise UsageError(
                    f"--rate: model '{model}' keeps state, and requests of a sequence come one after the other; "
                    "use --concurrency"
                )
            if inputs:
                values = [read_inputs(inputs)]
            else:
                values = _make_all(client, model, model_version, kind, batch, shape or [], data, seed)
            messages = _encode(client, model, model_version, kind, values)
        plan = _plan(
            target=url,
            requests=messages,
            duration_s=duration,
            warm_up_s=warm_up,
            channels=connections,
            streams=concurrency // connections,
            rate=rate,
            arrival=arrival,
            seed=seed,
            timeout_s=timeout_secs,
            path=MODEL_STREAM_INFER if kind.is_decoupled else MODEL_INFER,
            sequence_length=sequence_length if kind.is_stateful else 0,
            metadata=(*headers, *([] if token is None else [("authorization", f"Bearer {token}")])),
            credentials=None if tls_config is None else tls_config.credentials(),
        )
        result = _run(plan, output)
        output.show({"model": model, **result.to_dict()}, _tabulate(result))
        if result.lost:
            text = f"{result.lost:,} requests were lost: the connection to {url} broke"
            if result.is_target_gone:
                text += ", and none came back, so the run ended early"
            raise CommandError(text, ExitCode.REFUSED)
        if result.requests and not result.latencies_us().size:
            raise CommandError(f"no request succeeded: {result.errors}", ExitCode.REFUSED)


def _plan(**settings: Any) -> LoadPlan:
    try:
        return LoadPlan(**settings)
    except ValueError as error:
        raise UsageError(str(error)) from error


@dataclass(frozen=True, slots=True)
class _Kind:
    """What matters of a model's configuration for how it is asked."""

    is_batching: bool
    is_stateful: bool
    is_decoupled: bool


def _look_at(client: Client, model: str, version: str) -> _Kind:
    try:
        config = client.config(model, version)
    except RequestError as error:  # servers of the protocol's core have no configurations
        if error.code is not grpc.StatusCode.UNIMPLEMENTED:
            raise
        config = {}
    return _Kind(
        is_batching=bool(config.get("max_batch_size", 0)),
        is_stateful="sequence_batching" in config,
        is_decoupled=bool(config.get("model_transaction_policy", {}).get("decoupled", False)),
    )


def _make_all(
    client: Client, model: str, version: str, kind: _Kind, rows: int, shapes: list[str], data: MadeData, seed: int
) -> list[Any]:
    metadata, is_batching = client.metadata(model, version), kind.is_batching
    if rows > 1 and not is_batching:
        raise UsageError(f"--batch {rows}: model '{model}' takes one request at a time, it has no batch dimension")
    generator = np.random.default_rng(seed) if data is MadeData.RANDOM else None
    return [
        make_inputs(metadata, rows=rows, is_batching=is_batching, shapes=parse_shapes(shapes), generator=generator)
        for _ in range(1 if generator is None else _DIFFERENT_REQUESTS)
    ]


def _encode(client: Client, model: str, version: str, kind: _Kind, values: list[Any]) -> list[bytes]:
    """The serialised requests; the first is sent once, so that a request that cannot work is told before the load."""
    metadata = client.metadata(model, version)
    requests = [InferRequest(model, value, version=version) for value in values]
    trial = requests[0]
    if kind.is_stateful:
        place = {"sequence_id": SequenceIds().take(), "sequence_start": True, "sequence_end": True}
        trial = replace(trial, parameters=place)
    if kind.is_decoupled:
        for _ in client.stream([trial]):
            pass
    else:
        client.infer(model, values[0], version=version, parameters=trial.parameters)
    return [encode_infer(request, metadata).SerializeToString() for request in requests]


def _run(plan: LoadPlan, output: Output) -> LoadResult:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[answers]:,}"),
    )
    try:
        with Progress(*columns, console=output.console, transient=True, disable=output.is_json) as progress:
            task = progress.add_task("load", total=1.0, answers=0)
            return run_load(plan, lambda part, answers: progress.update(task, completed=part, answers=answers))
    except TargetUnreachable as error:
        raise CommandError(str(error), ExitCode.UNREACHABLE) from error


def _tabulate(result: LoadResult) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column(justify="left", style="bold")
    table.add_column(justify="right")
    table.add_row("requests/s", f"{result.req_per_s:,.0f}")
    if result.plan["loop"] == "open":
        table.add_row("offered/s", f"{result.offered_per_s:,.0f}")
    for percent in (50.0, 90.0, 99.0, 99.9):
        table.add_row(f"p{percent:g} ms", f"{result.percentile_us(percent) / 1e3:.3f}")
    table.add_row("requests", f"{result.requests:,}")
    for code, count in result.errors.items():
        table.add_row(f"[red]{code}[/red]", f"{count:,}")
    if result.is_target_gone:
        table.add_row("ended early", "no connection came back")
    if result.is_cut_short:
        table.add_row("cut short", "by the bound on requests kept in memory")
    return table
