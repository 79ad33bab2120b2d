"""``aiorch model``: what the registry knows."""

from __future__ import annotations

import math
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from aiorch_client import UnavailableError
from aiorch_client.admin import AdminClient, Model, ModelVersion, Provenance
from aiorch_client.admin.push import Progress as Told
from rich.console import RenderableType

from aiorch_server.cli.admin import add_row, admin_command, describe, make_table, show_time
from aiorch_server.cli.connection import ClientOutput
from aiorch_server.cli.output import CommandError, ExitCode, UsageError
from aiorch_server.cli.reference import (
    ModelName,
    Reference,
    check_model_name,
    parse_number,
    parse_pairs,
    parse_reference,
)

#: Between two lines about an upload where there is no terminal.
_LINE_S = 10.0
group = typer.Typer(no_args_is_help=True, help="Registers, lists and names models and their versions.")


@group.command("push")
@admin_command
def push(
    client: AdminClient,
    output: ClientOutput,
    model: ModelName,
    path: Annotated[Path, typer.Argument(help="A folder, a single artefact, or a .tar, .tar.gz or .zip.")],
    alias: Annotated[list[str] | None, typer.Option(help="Points to the new version at once; repeatable.")] = None,
    framework: Annotated[str, typer.Option(help="The backend; by default told from the file's name.")] = "",
    framework_version: Annotated[str, typer.Option(help="What it was made with.")] = "",
    metric: Annotated[list[str] | None, typer.Option(help="NAME=NUMBER that training measured; repeatable.")] = None,
    data_hash: Annotated[str, typer.Option(help="Of the training data, such as sha256:....")] = "",
    git_commit: Annotated[str, typer.Option(help="By default that of the checkout which holds the files.")] = "",
    description: Annotated[str, typer.Option(help="In a sentence.")] = "",
    label: Annotated[list[str] | None, typer.Option(help="NAME=VALUE; repeatable.")] = None,
    upload_id: Annotated[str, typer.Option(help="Go on with an upload that broke off: what its message says.")] = "",
) -> None:
    """Uploads a new version; the model is registered if it is not there."""
    check_model_name(model)
    metrics = {name: _finite(value) for name, value in parse_pairs(metric or [], "--metric").items()}
    provenance = Provenance(
        framework=framework,
        framework_version=framework_version,
        metrics=metrics,
        data_hash=data_hash,
        git_commit=git_commit,
        description=description,
        labels=parse_pairs(label or [], "--label"),
    )
    # named here, so that whoever is cut off can be told how to go on
    id = upload_id or str(uuid.uuid4())
    try:
        with _progress(output, path.name) as told:
            version = client.push(
                model, path, aliases=alias or (), provenance=provenance, upload_id=id, progress=told
            )  # fmt: skip
    except (KeyboardInterrupt, UnavailableError) as error:
        how = f"what came stays at the server: go on with the same command and --upload-id {id}"
        if isinstance(error, KeyboardInterrupt):
            raise CommandError(f"interrupted; {how}", ExitCode.INTERRUPTED) from None
        raise CommandError(f"{error.details}; {how}", ExitCode.REFUSED, error.code.name, error.reason) from None
    names = "".join(f", {model}@{each}" for each in version.aliases)
    text = f"{model}:{version.version}{names}: {version.size_bytes:,} bytes in {_count_files(version)}"
    output.show({"version": describe(version)}, text)


def _count_files(version: ModelVersion) -> str:
    return f"{len(version.files):,} file{'s' if len(version.files) != 1 else ''}"


def _finite(text: str) -> float:
    value = parse_number(text, "--metric")
    if not math.isfinite(value):
        raise UsageError(f"--metric: '{text}' is not finite")
    return value


@contextmanager
def _progress(output: ClientOutput, name: str) -> Iterator[Told | None]:
    """What to call with the bytes sent; a bar at a terminal, elsewhere a line now and then, nothing with JSON."""
    if output.is_json or not output.is_terminal:
        yield None if output.is_json else _tell_lines(output, name)
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    bar = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=output.console)
    with bar:
        task = bar.add_task(f"reading {name}", total=None)

        def tell(sent: int, total: int) -> None:
            description = f"sending {name}" if sent < total else f"checking {name}"
            bar.update(task, completed=sent, total=total, description=description)

        yield tell


def _tell_lines(output: ClientOutput, name: str) -> Told:
    told_s = time.monotonic()

    def tell(sent: int, total: int) -> None:
        nonlocal told_s
        if sent < total and time.monotonic() >= told_s + _LINE_S:
            told_s = time.monotonic()
            output.show({}, f"sending {name}: {sent:,} of {total:,} bytes, {sent / total:.0%}")

    return tell


@group.command("list")
@admin_command
def list_models(
    client: AdminClient,
    output: ClientOutput,
    prefix: Annotated[str, typer.Argument(help="Only names that begin so.")] = "",
) -> None:
    """Lists the models."""
    models = list(client.list_models(prefix))
    table = make_table("model", "latest", "aliases", "description", "registered", "by", numbers=("latest",))
    for model in models:
        latest = model.latest_version or ""
        created = show_time(model.created_at)
        add_row(table, model.name, latest, _write_aliases(model), model.description, created, model.created_by)
    text = "no models" + (
        f" that begin with '{prefix}'"
        if prefix
        else f"; {output.write_command('model', 'push', 'MODEL', 'PATH')} makes one"
    )
    output.show({"models": [describe(model) for model in models]}, table if models else text)


def _write_aliases(model: Model) -> str:
    return " ".join(f"{alias}={version}" for alias, version in sorted(model.aliases.items()))


@group.command("show")
@admin_command
def show(client: AdminClient, output: ClientOutput, reference: Reference) -> None:
    """Shows a model with its versions, or one version with its files."""
    named = parse_reference(reference)
    if named.version or named.alias:
        version = client.get_version(named.model, named.version, alias=named.alias)
        output.show({"version": describe(version)}, *_render_version(version))
        return
    model, versions = client.get_model(named.model), list(client.list_versions(named.model))
    table = make_table(
        "version", "aliases", "framework", "bytes", "files", "uploaded", "by", numbers=("version", "bytes")
    )
    for each in versions:
        size = f"{each.size_bytes:,}"
        framework = f"{each.provenance.framework} {each.provenance.framework_version}".strip()
        cells = (each.version, " ".join(each.aliases), framework, size, len(each.files))
        add_row(table, *cells, show_time(each.created_at), each.created_by)
    document = {"model": describe(model), "versions": [describe(each) for each in versions]}
    headline = f"{model.name}: {model.description}" if model.description else model.name
    output.show(document, headline, table if versions else "it has no versions")


def _render_version(version: ModelVersion) -> Iterator[RenderableType]:
    provenance = version.provenance
    lines = {
        "aliases": " ".join(version.aliases),
        "digest": version.digest,
        "uploaded": f"{show_time(version.created_at)} by {version.created_by}",
        "framework": f"{provenance.framework} {provenance.framework_version}".strip(),
        "inputs": ", ".join(f"{each.name} {each.datatype} {list(each.shape)}" for each in provenance.inputs),
        "outputs": ", ".join(f"{each.name} {each.datatype} {list(each.shape)}" for each in provenance.outputs),
        "metrics": ", ".join(f"{name}={value:g}" for name, value in sorted(provenance.metrics.items())),
        "data": provenance.data_hash,
        "commit": provenance.git_commit,
        "labels": " ".join(f"{name}={value}" for name, value in sorted(provenance.labels.items())),
        "code": "yes: loading it runs code of its author's choice" if version.has_code else "",
    }
    yield f"{version.model}:{version.version} {provenance.description}".strip()
    yield "\n".join(f"  {name:<10} {value}" for name, value in lines.items() if value)
    table = make_table("file", "bytes", "sha256", numbers=("bytes",))
    for file in version.files:
        add_row(table, file.path, f"{file.size_bytes:,}", file.sha256)
    yield table


@group.command("alias")
@admin_command
def alias(
    client: AdminClient,
    output: ClientOutput,
    model: ModelName,
    alias: Annotated[str, typer.Argument(help="Such as prod.")],
    version: Annotated[int, typer.Argument(min=0, help="The version it shall point to; 0 takes the alias away.")],
    expected: Annotated[int, typer.Option(min=0, help="Only if it points to this version now.")] = 0,
) -> None:
    """Points an alias at a version."""
    changed = client.set_alias(check_model_name(model), alias, version, expected_version=expected)
    text = f"{model}@{alias} is version {version}" if version else f"{model}@{alias} is no more"
    output.show({"model": describe(changed)}, text)


@group.command("delete")
@admin_command
def delete(
    client: AdminClient,
    output: ClientOutput,
    reference: Reference,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Deletes a version (MODEL:7) for good, or a model (MODEL) that has no versions."""
    named = parse_reference(reference)
    if named.alias:
        raise UsageError(
            f"'{reference}': name the version by its number, or take the alias away with aiorch model alias"
        )
    what = f"version {named.version} of {named.model}" if named.version else f"model {named.model}"
    if not yes:
        if output.is_json or not sys.stdin.isatty():
            raise UsageError(f"deleting {what} cannot be undone: add --yes")
        typer.confirm(f"Delete {what} for good?", abort=True)
    if named.version:
        client.delete_version(named.model, named.version)
    else:
        client.delete_model(named.model)
    output.show({"deleted": {"model": named.model, "version": named.version}}, f"{what} is deleted")
