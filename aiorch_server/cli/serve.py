"""``aiorch serve``: the server in the foreground."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO, cast

import typer

from aiorch_server.cli.announce import Announcer, ServedModel
from aiorch_server.cli.outlet import never_waiting
from aiorch_server.cli.output import CommandError, ExitCode, Json, Output
from aiorch_server.cli.settings import build_config
from aiorch_server.config.server import ControlMode, LogFormat, LogLevel, Scheduling, ServerConfig, Transport
from aiorch_server.errors import AiorchError, CapacityError, NotFoundError, RequestError

if TYPE_CHECKING:
    from aiorch_server.app import Application
    from aiorch_server.observability.log_settings import LogSettings

_BOOLEAN = "true|false"


def serve(
    model_repository: Annotated[
        list[str] | None,
        typer.Option("--model-repository", "--model-store", help="Folder with one folder per model; repeatable."),
    ] = None,
    model_control_mode: Annotated[
        ControlMode | None,
        typer.Option(help="none: all at start; explicit: on request; poll: as the repository changes; default none."),
    ] = None,
    load_model: Annotated[
        list[str] | None, typer.Option(help="A model to load at start in mode explicit, * for all; repeatable.")
    ] = None,
    repository_poll_secs: Annotated[
        float | None, typer.Option(help="Seconds between two looks in mode poll; default 15.")
    ] = None,
    strict_readiness: Annotated[
        str | None, typer.Option(metavar=_BOOLEAN, help="Ready only while every model is that should be; default true.")
    ] = None,
    exit_timeout_secs: Annotated[
        float | None, typer.Option(help="Longest wait for requests under way when stopping; default 30.")
    ] = None,
    model_load_timeout_secs: Annotated[
        float | None, typer.Option(help="Longest time for one model to load; default 300.")
    ] = None,
    model_load_thread_count: Annotated[
        int | None, typer.Option(help="Models that load at the same time; default 4.")
    ] = None,
    load_on_demand: Annotated[
        list[str] | None,
        typer.Option(help="A model that the first request for it loads; * for any characters; repeatable."),
    ] = None,
    memory_budget_bytes: Annotated[
        int | None, typer.Option(help="What models may take of this process's memory, 0: no bound; default 0.")
    ] = None,
    device_budget: Annotated[
        list[str] | None, typer.Option(help="What models may take of a device, such as cuda:0=8GiB; repeatable.")
    ] = None,
    id: Annotated[str | None, typer.Option(help="The name in the server's metadata; default aiorchestrator.")] = None,
    allow_grpc: Annotated[
        str | None, typer.Option(metavar=_BOOLEAN, help="Whether to listen for gRPC; default true.")
    ] = None,
    grpc_address: Annotated[
        str | None, typer.Option(help="Address to listen on, also unix:PATH; default 127.0.0.1.")
    ] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port, 0 takes a free one; default 8001.")] = None,
    transport: Annotated[Transport | None, typer.Option(help="What carries gRPC; default native.")] = None,
    io_threads: Annotated[
        int | None, typer.Option(help="Threads for gRPC; 0: the event loop does it; default 1.")
    ] = None,
    scheduling: Annotated[
        Scheduling | None,
        typer.Option(help="Whether threads for gRPC go before all others, which needs a privilege; default plain."),
    ] = None,
    reuse_port: Annotated[
        str | None,
        typer.Option(metavar=_BOOLEAN, help="Whether other processes may share the gRPC port; default false."),
    ] = None,
    grpc_keepalive_time: Annotated[
        int | None, typer.Option(help="Milliseconds of silence until a client is sent a PING; default 7200000.")
    ] = None,
    grpc_keepalive_timeout: Annotated[
        int | None, typer.Option(help="Milliseconds that it may take to answer; default 20000.")
    ] = None,
    grpc_keepalive_permit_without_calls: Annotated[
        str | None, typer.Option(metavar=_BOOLEAN, help="Whether PINGs are fine without calls; default false.")
    ] = None,
    grpc_http2_min_recv_ping_interval_without_data: Annotated[
        int | None, typer.Option(help="Milliseconds between a client's PINGs, unless it is sent data; default 300000.")
    ] = None,
    grpc_http2_max_ping_strikes: Annotated[
        int | None, typer.Option(help="PINGs that may come too early, 0: any number; default 2.")
    ] = None,
    grpc_max_connection_age: Annotated[
        int | None, typer.Option(help="Milliseconds until a connection is told to go, 0: never; default 0.")
    ] = None,
    grpc_max_connection_age_grace: Annotated[
        int | None, typer.Option(help="Milliseconds that its calls may then take, 0: any time; default 0.")
    ] = None,
    grpc_use_ssl: Annotated[str | None, typer.Option(metavar=_BOOLEAN, help="Whether gRPC speaks TLS.")] = None,
    grpc_server_cert: Annotated[Path | None, typer.Option(help="PEM of the server's certificate.")] = None,
    grpc_server_key: Annotated[Path | None, typer.Option(help="PEM of the server's key.")] = None,
    grpc_root_cert: Annotated[Path | None, typer.Option(help="PEM of authorities for clients' certificates.")] = None,
    grpc_use_ssl_mutual: Annotated[
        str | None, typer.Option(metavar=_BOOLEAN, help="Whether clients must show a certificate.")
    ] = None,
    grpc_restricted_protocol: Annotated[
        list[str] | None,
        typer.Option(metavar="GROUPS:KEY=VALUE", help="Calls that need a header, see docs/protocol.md; repeatable."),
    ] = None,
    allow_http: Annotated[
        str | None, typer.Option(metavar=_BOOLEAN, help="Whether to listen for REST; default true.")
    ] = None,
    http_address: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    http_port: Annotated[int | None, typer.Option(help="Port, 0 takes a free one; default 8000.")] = None,
    http_restricted_api: Annotated[
        list[str] | None,
        typer.Option(metavar="GROUPS:KEY=VALUE", help="REST calls that need a header; repeatable."),
    ] = None,
    allow_metrics: Annotated[
        str | None, typer.Option(metavar=_BOOLEAN, help="Whether to serve metrics; default true.")
    ] = None,
    metrics_address: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port, 0 takes a free one; default 8002.")] = None,
    instances: Annotated[
        int | None, typer.Option(help="Instances of a model whose configuration does not say; default 1.")
    ] = None,
    default_max_batch_size: Annotated[
        int | None, typer.Option(help="Batch size of a model that can batch and does not say, 0: never; default 32.")
    ] = None,
    rate_limit_resource: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:COUNT[:GPU]", help="How much of a resource models may hold together; repeatable."),
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="A further backend, MODULE:ATTRIBUTE; repeatable.")] = None,
    backend_config: Annotated[
        list[str] | None, typer.Option(help="default-max-batch-size=N; anything else belongs to the model.")
    ] = None,
    allow_code: Annotated[
        bool | None, typer.Option("--allow-code", help="Open pickles, and code that comes with load requests.")
    ] = None,
    insecure: Annotated[
        bool | None,
        typer.Option("--insecure", help="Let other machines reach doors without TLS, or without credentials."),
    ] = None,
    shared_memory: Annotated[
        str | None,
        typer.Option(
            "--shared-memory",
            "--allow-client-shm",
            metavar="off|on|/PREFIX",
            help="Whether clients may register system shared memory: none, any, or keys with this prefix; default off.",
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="off|local|redis|NAME|MODULE:ATTRIBUTE",
            help="Where answers of models with response_cache are kept; default off.",
        ),
    ] = None,
    cache_size_bytes: Annotated[
        int | None, typer.Option(help="Bytes that the cache may hold; default 67108864.")
    ] = None,
    cache_ttl_secs: Annotated[
        float | None, typer.Option(help="Seconds that an answer stays in the cache, 0: any time; default 0.")
    ] = None,
    cache_config: Annotated[
        list[str] | None,
        typer.Option(help="Triton's form, repeatable: local,size=BYTES or redis,host=HOST,port=PORT and so on."),
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Database of the model registry, such as sqlite:///aiorch.db; without it none."
        ),
    ] = None,
    artefacts: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|s3://...",
            help="Where the registry's artefacts are; without it artefacts beside SQLite's file.",
        ),
    ] = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="The least severe records to write; default info.")] = None,
    log_verbose: Annotated[int | None, typer.Option(help="Above 0: the same as --log-level debug.")] = None,
    log_format: Annotated[
        LogFormat | None, typer.Option(help="Text or JSON lines, to standard error; default text.")
    ] = None,
    log_slow_us: Annotated[
        int | None, typer.Option(help="Write down requests that take that many microseconds, 0: none; default 0.")
    ] = None,
    trace_endpoint: Annotated[
        str | None, typer.Option(help="OTLP receiver over HTTP for traces, such as http://127.0.0.1:4318.")
    ] = None,
    trace_rate: Annotated[
        int | None, typer.Option(help="Trace one request in so many whose callers do not trace; default 1000.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML or TOML with these and all other settings: docs/settings.md.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="NAME=VALUE for any setting, for example grpc_max_message_bytes=1048576; repeatable."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Serves the models of a repository over gRPC and REST until it is told to stop."""
    options = {
        "model_repository": model_repository,
        "model_control_mode": model_control_mode,
        "load_model": load_model,
        "repository_poll_secs": repository_poll_secs,
        "strict_readiness": strict_readiness,
        "exit_timeout_secs": exit_timeout_secs,
        "model_load_timeout_secs": model_load_timeout_secs,
        "model_load_thread_count": model_load_thread_count,
        "load_on_demand": load_on_demand,
        "memory_budget_bytes": memory_budget_bytes,
        "device_budget": device_budget,
        "id": id,
        "allow_grpc": allow_grpc,
        "grpc_address": grpc_address,
        "grpc_port": grpc_port,
        "transport": transport,
        "io_threads": io_threads,
        "scheduling": scheduling,
        "reuse_port": reuse_port,
        "grpc_keepalive_time": grpc_keepalive_time,
        "grpc_keepalive_timeout": grpc_keepalive_timeout,
        "grpc_keepalive_permit_without_calls": grpc_keepalive_permit_without_calls,
        "grpc_http2_min_recv_ping_interval_without_data": grpc_http2_min_recv_ping_interval_without_data,
        "grpc_http2_max_ping_strikes": grpc_http2_max_ping_strikes,
        "grpc_max_connection_age": grpc_max_connection_age,
        "grpc_max_connection_age_grace": grpc_max_connection_age_grace,
        "grpc_server_cert": grpc_server_cert,
        "grpc_server_key": grpc_server_key,
        "grpc_root_cert": grpc_root_cert,
        "grpc_use_ssl_mutual": grpc_use_ssl_mutual,
        "grpc_restricted_protocol": grpc_restricted_protocol,
        "allow_http": allow_http,
        "http_address": http_address,
        "http_port": http_port,
        "http_restricted_api": http_restricted_api,
        "allow_metrics": allow_metrics,
        "metrics_address": metrics_address,
        "metrics_port": metrics_port,
        "instances": instances,
        "default_max_batch_size": default_max_batch_size,
        "rate_limit_resource": rate_limit_resource,
        "backends": backend,
        "allow_code": allow_code,
        "insecure": insecure,
        "shared_memory": shared_memory,
        "cache": cache,
        "cache_size_bytes": cache_size_bytes,
        "cache_ttl_secs": cache_ttl_secs,
        "registry": registry,
        "artefacts": artefacts,
        "log_level": log_level,
        "log_format": log_format,
        "log_slow_us": log_slow_us,
        "trace_endpoint": trace_endpoint,
        "trace_rate": trace_rate,
    }
    output = Output(json)
    with output.guard():
        server_config = build_config(
            options,
            file=config,
            use_ssl=grpc_use_ssl,
            log_verbose=log_verbose,
            backend_config=backend_config or [],
            cache_config=cache_config or [],
            others=setting or [],
        )
        _run(server_config, Announcer(output))


class _CurrentStderr:
    """Writes to what ``sys.stderr`` is at that moment: the spinner puts itself there while it turns."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _run(config: ServerConfig, announcer: Announcer) -> None:
    """Serves until a signal ends it; CommandError where it cannot start."""
    with never_waiting():
        _run_server(config, announcer)


def _run_server(config: ServerConfig, announcer: Announcer) -> None:
    from aiorch_server.observability.log_settings import LogSettings
    from aiorch_server.observability.logging import configure_logging

    # A record on the same terminal must not break into the spinner's line.
    stream = cast("TextIO", _CurrentStderr()) if sys.stderr.isatty() else None
    log_settings = LogSettings(
        *configure_logging(config.log.level, config.log.format.value, stream), config.log.format.value
    )
    # An instance waits that long for a busy thread each time it calls its model: Python's own 5 ms would be felt.
    sys.setswitchinterval(config.execution.switch_interval_us / 1e6)
    try:
        with asyncio.Runner(loop_factory=_choose_loop()) as runner:
            runner.run(_serve(config, announcer, log_settings))
    except AiorchError as error:
        raise CommandError(str(error), ExitCode.REFUSED) from error
    except OSError as error:
        hint = "ports are chosen with --grpc-port, --http-port and --metrics-port; 0 takes a free one"
        raise CommandError(f"{error.strerror or error}; {hint}", ExitCode.REFUSED) from error


def _choose_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return None
    return cast("Callable[[], asyncio.AbstractEventLoop]", uvloop.new_event_loop)


async def _serve(config: ServerConfig, announcer: Announcer, log_settings: LogSettings) -> None:
    # Imported here: it brings the web framework and the compiled core, which no other command needs.
    from aiorch_server.app import Application

    application = Application(config, observe=announcer.on_model, log_settings=log_settings)
    announcer.begin()
    try:
        await application.run(
            lambda: announcer.on_ready(
                *_look_at(application), has_tls=config.grpc.tls.is_enabled, has_registry=config.registry.is_enabled
            )
        )
    finally:
        announcer.end()
    announcer.on_stop()


def _look_at(application: Application) -> tuple[dict[str, str], list[ServedModel]]:
    """Where the application listens, by door, and what it serves."""
    config, control = application.config, application.controlplane
    doors = {
        "http": (config.http.host, application.http_port),
        "metrics": (config.metrics.host, application.metrics_port),
    }
    addresses = {
        name: f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        for name, (host, port) in doors.items()
        if port is not None
    }
    if application.grpc_port is not None:
        addresses = {"grpc": config.grpc.write_address(application.grpc_port), **addresses}
    models = []
    for entry in control.repository_index():
        try:
            found = (control.model_config(entry.name, entry.version), control.model_metadata(entry.name, entry.version))
        except (NotFoundError, RequestError, CapacityError):  # it does not serve: its state and reason tell
            models.append(ServedModel(entry))
        else:
            models.append(ServedModel(entry, *found))
    return addresses, models
