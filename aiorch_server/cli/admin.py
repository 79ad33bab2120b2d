"""What the commands of the admin API share: the way to their server, and words for what it refuses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
from aiorch_client import ClientError, NotFoundError, RequestError, TlsConfig
from aiorch_client.admin import AdminClient
from rich.table import Table
from rich.text import Text

from aiorch_server.cli.connection import (
    CONNECT_S,
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
    read_headers,
    read_token,
)
from aiorch_server.cli.output import CommandError, ExitCode, Json, UsageError
from aiorch_server.config.problems import suggest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NO_REGISTRY: Final = "this server has no registry; start it with --registry URL, such as sqlite:///aiorch.db"
#: The options of every such command, behind its own.
_OPTIONS: Final = tuple(
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    for name, annotation, default in (
        ("url", Url, DEFAULT_URL),
        ("timeout_secs", TimeoutSecs, 60.0),
        ("tls", UseTls, False),
        ("tls_root_cert", TlsRoot, None),
        ("tls_cert", TlsCert, None),
        ("tls_key", TlsKey, None),
        ("token_file", TokenFile, None),
        ("header", HeaderOption, None),
        ("json", Json, False),
    )
)


def admin_command(function: Callable[..., None]) -> Callable[..., None]:
    """``function(client, output, ...)`` as a command that also takes the options by which it finds its server.

    What the client raises becomes a text and an exit code; an unknown model, named by the option ``model`` or
    ``reference``, one that names those which are like it.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [each for name, each in signature.parameters.items() if name not in ("client", "output")]

    def run(**options: Any) -> None:
        connection = {each.name: options.pop(each.name) for each in _OPTIONS}
        output = ClientOutput(connection.pop("json"), connection)
        with output.guard(), open_admin(**connection) as client, _explaining(client, options):
            function(client, output, **options)

    keywords = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = signature.replace(parameters=[*keywords, *_OPTIONS])  # type: ignore[attr-defined]
    run.__annotations__ = {}  # of the signature alone
    return run


@contextmanager
def open_admin(
    *,
    url: str,
    timeout_secs: float,
    tls: bool = False,
    tls_root_cert: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    token_file: Path | None = None,
    header: list[str] | None = None,
) -> Iterator[AdminClient]:
    """A connected client; UnreachableError where nobody answers."""
    tls_config: TlsConfig | None = make_tls(tls, tls_root_cert, tls_cert, tls_key)
    try:
        made = AdminClient(
            url,
            tls=tls_config,
            token=read_token(token_file),
            metadata=read_headers(header),
            timeout_s=timeout_secs,
        )
    except RequestError as error:  # nothing was sent yet: the address or the files are wrong
        raise UsageError(error.details) from error
    with made as client:
        client.connect(min(timeout_secs, CONNECT_S))
        yield client


@contextmanager
def _explaining(client: AdminClient, options: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        raise CommandError(_explain(error, client, options), _judge(error), error.code.name, error.reason) from None
    except KeyboardInterrupt:
        raise CommandError("interrupted", ExitCode.INTERRUPTED) from None


def _judge(error: ClientError) -> ExitCode:
    # no server said so: what was asked for cannot be
    is_local = isinstance(error, RequestError) and not isinstance(error.__cause__, grpc.RpcError)
    return ExitCode.USAGE if is_local else ExitCode.REFUSED


def _explain(error: ClientError, client: AdminClient, options: dict[str, Any]) -> str:
    if error.code is grpc.StatusCode.UNIMPLEMENTED and not error.reason:  # with one, the admin API itself says so
        return NO_REGISTRY
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        return f"{error.details}; give a token or API key with --token-file FILE or AIORCH_TOKEN"
    if error.reason == "CHECKSUM_MISMATCH":
        return f"{error.details}; a file that changes while it is sent does that: push when nothing writes there"
    if isinstance(error, NotFoundError):
        reference = str(options.get("reference") or options.get("model") or "")
        return error.details + _suggest(client, reference, error.reason == "UNKNOWN_VERSION")
    return error.details


def _suggest(client: AdminClient, reference: str, is_version_unknown: bool) -> str:
    """Names that are like the one that is not known; nothing where they cannot be had."""
    model, _, alias = reference.partition("@")
    model = model.partition(":")[0]
    try:
        known = {each.name: each for each in client.list_models()} if model else {}
    except ClientError:
        return ""
    if model not in known:
        return suggest(model, known) if known else ""
    if alias and alias not in known[model].aliases:
        return suggest(alias, known[model].aliases) if known[model].aliases else "; the model has no aliases"
    if is_version_unknown:
        latest = known[model].latest_version
        return f"; the latest is {latest}" if latest else "; aiorch model push uploads one"
    return ""


def describe(value: DataclassInstance) -> dict[str, Any]:
    """A value of the admin client for JSON."""
    return asdict(value)


def make_table(*columns: str, numbers: tuple[str, ...] = ()) -> Table:
    """A plain table; the columns in ``numbers`` stand to the right."""
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left")
    return table


def add_row(table: Table, *cells: object) -> None:
    """A row of texts, in which nothing is markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells))


def show_time(time: datetime | None) -> str:
    """A time in this machine's zone, to the second; empty for none."""
    return "" if time is None else f"{time.astimezone():%Y-%m-%d %H:%M:%S}"
