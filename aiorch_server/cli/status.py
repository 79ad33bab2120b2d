"""``aiorch status``: the server, its models and what they did so far, and what is deployed from the registry."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from aiorch_client import Client, ModelIndexEntry, ModelStatistics, RequestError
from rich.table import Table
from rich.text import Text

from aiorch_server.cli.connection import (
    DEFAULT_URL,
    URL_HELP,
    ClientOutput,
    HeaderOption,
    TimeoutSecs,
    TlsCert,
    TlsKey,
    TlsRoot,
    TokenFile,
    UseTls,
    make_tls,
    open_client,
    read_headers,
    read_token,
)
from aiorch_server.cli.deployed import describe_all, find_deployments, show_deployment
from aiorch_server.cli.following import tabulate_deployments
from aiorch_server.cli.output import STATE_STYLES, Json, UsageError, write_reasons
from aiorch_server.cli.readiness import Door, check_ready, find_door


def status(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Only its deployment, with the rollout.")] = "",
    url: Annotated[str, typer.Option("--url", "-u", show_default=DEFAULT_URL, help=URL_HELP)] = "",
    timeout_secs: TimeoutSecs = 10.0,
    tls: UseTls = False,
    tls_root_cert: TlsRoot = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    header: HeaderOption = None,
    ready: Annotated[
        bool, typer.Option("--ready", help="Only whether it takes requests: exit code 0, or 1 with the reason.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="With --ready and without --url: the server of this file; else of AIORCH_CONFIG, AIORCH_..."),
    ] = None,
    json: Json = False,
) -> None:
    """Shows a server, its models, their statistics and deployments; or the deployment of one model."""
    output = ClientOutput(json)
    if ready or config is not None:
        with output.guard():
            if model or not ready or (url and config is not None):
                raise UsageError("--ready asks for the whole server, by --url or by --config; --config is for it alone")
            given = make_tls(tls, tls_root_cert, tls_cert, tls_key)
            token, headers = read_token(token_file), read_headers(header)
            door = Door(url, given, token, headers) if url else find_door(config, given, token, headers)
            check_ready(output, door, timeout_secs)
        return
    url = url or DEFAULT_URL
    if model:
        show_deployment(
            model=model,
            url=url,
            timeout_secs=timeout_secs,
            tls=tls,
            tls_root_cert=tls_root_cert,
            tls_cert=tls_cert,
            tls_key=tls_key,
            token_file=token_file,
            header=header,
            json=json,
        )
        return
    with output.guard():
        tls_config, token = make_tls(tls, tls_root_cert, tls_cert, tls_key), read_token(token_file)
        headers = read_headers(header)
        with open_client(url, timeout_s=timeout_secs, tls=tls_config, token=token, metadata=headers) as client:
            metadata = client.server_metadata()
            is_ready = client.is_ready()
            entries, statistics = _list_models(client), client.statistics()
        deployments, problem = find_deployments(
            url, tls=tls_config, token=token, metadata=headers, timeout_s=timeout_secs
        )
        found = {(each.name, each.version): each for each in statistics}
        server = {"url": url, "is_ready": is_ready, **asdict(metadata)}
        models = [_describe(entry, found.get((entry.name, entry.version))) for entry in entries]
        state = Text(" ready", "green") if is_ready else Text(" not ready", "red")
        headline = Text(f"{metadata.name} {metadata.version} at {url}").append_text(state)
        more = [tabulate_deployments(deployments)] if deployments else []
        output.show(
            {"server": server, "models": models, "deployments": describe_all(deployments)},
            headline, _tabulate(models), *write_reasons(models), *more, *([problem] if problem else []),
        )  # fmt: skip


def _list_models(client: Client) -> tuple[ModelIndexEntry, ...]:
    """The repository's index; servers of the protocol's core know only statistics."""
    try:
        return client.index()
    except RequestError as error:
        if error.code is not grpc.StatusCode.UNIMPLEMENTED:
            raise
    return tuple(ModelIndexEntry(each.name, each.version, "READY", "") for each in client.statistics())


def _describe(entry: ModelIndexEntry, statistics: ModelStatistics | None) -> dict[str, Any]:
    described: dict[str, Any] = {**asdict(entry), "statistics": None}
    if statistics is not None:
        described["statistics"] = {
            "requests": statistics.success.count,
            "failed": statistics.fail.count,
            "rows": statistics.inference_count,
            "batches": statistics.execution_count,
            "mean_batch": statistics.mean_batch,
            "mean_queue_ms": statistics.queue.mean_ms,
            "mean_compute_ms": statistics.compute_infer.mean_ms,
        }
    return described


def _tabulate(models: list[dict[str, Any]]) -> Table:
    table = Table("model", "version", "state", box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in ("requests", "failed", "rows", "rows/\nbatch", "queue\nms", "compute\nms"):
        table.add_column(column, justify="right")
    for model in models:
        counts = model["statistics"]
        numbers = [""] * 6
        if counts is not None:
            numbers = [f"{counts[key]:,}" for key in ("requests", "failed", "rows")]
            numbers += [f"{counts['mean_batch']:.1f}"]
            numbers += [f"{counts[key]:.3f}" for key in ("mean_queue_ms", "mean_compute_ms")]
        state = Text(model["state"], STATE_STYLES.get(model["state"], ""))
        table.add_row(Text(model["name"]), model["version"], state, *numbers)
    return table
