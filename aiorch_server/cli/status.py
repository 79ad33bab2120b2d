"""``aiorch status``: the server, its models and what they did so far."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import grpc
from aiorch_client import Client, ModelIndexEntry, ModelStatistics, RequestError
from rich.table import Table
from rich.text import Text

from aiorch_server.cli.connection import (
    DEFAULT_URL,
    ClientOutput,
    TimeoutSecs,
    TlsCert,
    TlsKey,
    TlsRoot,
    TokenFile,
    Url,
    UseTls,
    make_tls,
    open_client,
    read_token,
)
from aiorch_server.cli.output import STATE_STYLES, Json, write_reasons


def status(
    url: Url = DEFAULT_URL,
    timeout_secs: TimeoutSecs = 10.0,
    tls: UseTls = False,
    tls_root_cert: TlsRoot = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    token_file: TokenFile = None,
    json: Json = False,
) -> None:
    """Shows a server, its models and their statistics."""
    output = ClientOutput(json)
    with output.guard():
        tls_config = make_tls(tls, tls_root_cert, tls_cert, tls_key)
        with open_client(url, timeout_s=timeout_secs, tls=tls_config, token=read_token(token_file)) as client:
            metadata = client.server_metadata()
            is_ready = client.is_ready()
            entries, statistics = _list_models(client), client.statistics()
        found = {(each.name, each.version): each for each in statistics}
        server = {"url": url, "is_ready": is_ready, **asdict(metadata)}
        models = [_describe(entry, found.get((entry.name, entry.version))) for entry in entries]
        state = Text(" ready", "green") if is_ready else Text(" not ready", "red")
        headline = Text(f"{metadata.name} {metadata.version} at {url}").append_text(state)
        output.show({"server": server, "models": models}, headline, _tabulate(models), *write_reasons(models))


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
