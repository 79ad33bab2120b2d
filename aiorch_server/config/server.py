"""The configuration of the server: one section per part, so that no part sees more than its own.

Built by ``config.load``; in tests directly, ``ServerConfig(grpc={"port": 0})``.
"""

from __future__ import annotations

import enum
import ipaddress
import re
import ssl
from collections.abc import Collection, Iterator
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, DirectoryPath, Field, FilePath, ValidationInfo, model_validator

from aiorch_server.config.names import check_name
from aiorch_server.config.problems import Problem, raise_problems
from aiorch_server.config.redis import RedisConfig
from aiorch_server.config.registry import RegistryConfig
from aiorch_server.config.restriction import Restricted, find_binary, find_repeated
from aiorch_server.config.section import Flag, Number, Section, Whole
from aiorch_server.config.security import SecurityConfig

LOOPBACK = "127.0.0.1"
DEFAULT_MESSAGE_BYTES = 64 * 1024 * 1024
_KEY_PREFIX = re.compile(r"/[^/\0]{1,200}")
_ENDPOINT = re.compile(r"https?://[^\s]+")
_CACHE_NAME = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)
_RESOURCE = re.compile(r"[^:,]+:\d{1,9}(:\d{1,9})?", re.ASCII)
_BUDGET = re.compile(r"(cuda:\d{1,3})=(\d{1,18}|\d{1,9}\.\d{1,6})(B|[KMGT]iB)?", re.ASCII)
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_PLUGIN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", re.ASCII)


def _check_plugin(text: str) -> str:
    if not _PLUGIN.fullmatch(text):
        raise ValueError("should be written 'module:attribute', for example 'my_package.backends:MyBackend'")
    return text


def _check_resource(text: str) -> str:
    if not _RESOURCE.fullmatch(text):
        raise ValueError("should be written 'NAME:COUNT' or 'NAME:COUNT:GPU', for example 'licence:2'")
    return text


Host = Annotated[str, Field(min_length=1)]
Port = Annotated[Whole, Field(ge=0, le=65535)]
Bytes = Annotated[Whole, Field(ge=1024, le=2**31 - 1)]
Count = Annotated[Whole, Field(ge=1, le=100_000)]
Seconds = Annotated[Number, Field(ge=0, le=7 * 24 * 3600)]
Plugin = Annotated[str, AfterValidator(_check_plugin)]
#: gRPC's channel arguments are in milliseconds; 0 is never.
Milliseconds = Annotated[Whole, Field(ge=0, le=2**31 - 1)]


class Transport(enum.StrEnum):
    """What carries gRPC: the compiled door over libnghttp2, or grpcio's own server."""

    NATIVE = "native"
    GRPCIO = "grpcio"


class Compression(enum.StrEnum):
    """What response messages are packed with, for clients that take that."""

    NONE = "none"
    GZIP = "gzip"
    DEFLATE = "deflate"


class Scheduling(enum.StrEnum):
    """How the kernel shares cores among the server's threads: fairly, or I/O threads first."""

    PLAIN = "plain"
    REALTIME = "realtime"


class ControlMode(enum.StrEnum):
    """Who decides what is loaded: all at start, load calls, or the repository as it changes."""

    NONE = "none"
    EXPLICIT = "explicit"
    POLL = "poll"


class LogLevel(enum.StrEnum):
    """The least severe records that are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class TraceLevel(enum.StrEnum):
    """What is traced from the start."""

    OFF = "off"
    TIMESTAMPS = "timestamps"


class LogFormat(enum.StrEnum):
    """One line of text or one JSON object per record."""

    TEXT = "text"
    JSON = "json"


class TlsConfig(Section):
    """PEM files of a door that speaks TLS; nothing written means plain text.

    ``root`` holds the authorities that clients' certificates are checked against. Every ``reload_secs`` (0: never) the
    files are looked at, and new connections get what was replaced.
    """

    certificate: FilePath | None = None
    key: FilePath | None = None
    root: FilePath | None = None
    require_client_auth: Flag = False
    reload_secs: Seconds = 60.0

    @property
    def is_enabled(self) -> bool:
        """Whether there is a certificate to show."""
        return self.certificate is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(self._find_problems())
        return self

    def _find_problems(self) -> Iterator[Problem]:
        if self.certificate is not None and self.key is None:
            yield Problem(("key",), "is missing; a certificate needs its key")
        if self.key is not None and self.certificate is None:
            yield Problem(("certificate",), "is missing; a key needs its certificate")
        if self.require_client_auth and self.root is None:
            yield Problem(("root",), "is missing; clients' certificates cannot be checked without it")
        if self.root is not None and self.certificate is None:
            yield Problem(("certificate",), "is missing; a root without it has no use")
        if self.certificate is not None and self.key is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password="")
            except (ssl.SSLError, OSError, ValueError) as error:
                yield Problem(("certificate",), f"does not load with its key: {error}")


class GrpcConfig(Section):
    """The gRPC door; port 0 takes any free one, and means nothing where ``host`` is a unix socket.

    ``io_threads`` serve it without the interpreter lock; with 0 the event loop does. Only the native transport has
    them, ``max_connections``, ``max_buffered_bytes`` (of all connections together; 0: no bound) and
    ``min_compress_bytes``. With ``reuse_port`` other processes may share the port; otherwise one that is taken is
    refused. Times and PINGs go by gRPC's channel arguments of the same names. ``compression`` and ``interceptors``
    (written ``module:attribute``) take ModelInfer off the compiled path: the first for clients that accept packed
    answers, the second unless their ``skipped_methods`` name it. So do ``restricted_protocols`` with group inference.
    """

    enabled: Flag = True
    host: Host = LOOPBACK
    port: Port = 8001
    transport: Transport = Transport.NATIVE
    io_threads: Annotated[Whole, Field(ge=0, le=64)] = 1
    reuse_port: Flag = False
    max_message_bytes: Bytes = DEFAULT_MESSAGE_BYTES
    max_buffered_bytes: Annotated[Whole, Field(ge=0, le=2**63 - 1)] = 1 << 30
    max_connections: Annotated[Whole, Field(ge=0, le=2**31 - 1)] = 10_000
    keepalive_time_ms: Milliseconds = 7_200_000
    keepalive_timeout_ms: Annotated[Milliseconds, Field(ge=1)] = 20_000
    keepalive_permit_without_calls: Flag = False
    http2_min_ping_interval_without_data_ms: Milliseconds = 300_000
    http2_max_ping_strikes: Annotated[Whole, Field(ge=0, le=2**31 - 1)] = 2
    max_connection_idle_ms: Milliseconds = 0
    max_connection_age_ms: Milliseconds = 0
    max_connection_age_grace_ms: Milliseconds = 0
    compression: Compression = Compression.NONE
    min_compress_bytes: Annotated[Whole, Field(ge=0, le=2**31 - 1)] = 1024
    interceptors: tuple[Plugin, ...] = ()
    restricted_protocols: tuple[Restricted, ...] = ()
    tls: TlsConfig = TlsConfig()

    def write_address(self, port: int) -> str:
        """Where the door is, with this port: ``127.0.0.1:8001``, ``[::1]:8001``, ``unix:/run/aiorch.sock``."""
        if self.host.startswith(("unix:", "unix-abstract:")):
            return self.host
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(self._find_problems())
        return self

    def _find_problems(self) -> Iterator[Problem]:
        if 0 < self.max_buffered_bytes < self.max_message_bytes:
            text = (
                f"found {self.max_buffered_bytes}; one message of max_message_bytes ({self.max_message_bytes}) must fit"
            )
            yield Problem(("max_buffered_bytes",), text)
        yield from find_repeated("restricted_protocols", self.restricted_protocols)
        yield from find_binary("restricted_protocols", self.restricted_protocols)


class HttpConfig(Section):
    """The REST door; port 0 takes any free one. With ``tls`` it speaks HTTPS alone."""

    enabled: Flag = True
    host: Host = LOOPBACK
    port: Port = 8000
    max_body_bytes: Bytes = DEFAULT_MESSAGE_BYTES
    restricted_apis: tuple[Restricted, ...] = ()
    tls: TlsConfig = TlsConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(find_repeated("restricted_apis", self.restricted_apis))
        return self


class MetricsConfig(Section):
    """The door that Prometheus reads; port 0 takes any free one. With ``tls`` it speaks HTTPS alone."""

    enabled: Flag = True
    host: Host = LOOPBACK
    port: Port = 8002
    tls: TlsConfig = TlsConfig()


class RepositoryConfig(Section):
    """Folders that hold models."""

    paths: tuple[DirectoryPath, ...] = ()


def _check_pattern(text: str) -> str:
    check_name(text.replace("*", "x"))
    return text


def _check_budget(text: str) -> str:
    read_budget(text)
    return text


def read_budget(text: str) -> tuple[str, int]:
    """The device and the bytes of ``cuda:0=8GiB``; ValueError with what would be right."""
    found = _BUDGET.fullmatch(text)
    if found is None:
        raise ValueError("should be written DEVICE=BYTES with a unit or none, for example 'cuda:0=8GiB'")
    return found[1], int(float(found[2]) * _UNITS[found[3] or "B"])


class LifecycleConfig(Section):
    """Which models are served and how they come and go.

    ``load_models`` is for control mode explicit; ``*`` stands for all. ``poll_secs`` is for control mode poll.
    ``exit_timeout_secs`` bounds how long requests in flight may take when the server stops. With
    ``is_readiness_strict`` the server is ready only while every model that should serve does.

    Models whose names ``load_on_demand`` covers (``*`` for any characters) are loaded by the first request for them.
    ``memory_budget_bytes`` (0: no bound) is what models may take of this process's memory, ``device_budgets`` of other
    devices, such as ``cuda:0=8GiB``. A load that needs more room evicts models that are loaded on demand and not in
    use, none before it was there for ``residence_secs``; while all are in use it waits for ``room_timeout_secs``.
    """

    control_mode: ControlMode = ControlMode.NONE
    load_models: tuple[str, ...] = ()
    poll_secs: Annotated[Number, Field(gt=0, le=24 * 3600)] = 15.0
    exit_timeout_secs: Seconds = 30.0
    is_readiness_strict: Flag = True
    load_timeout_secs: Annotated[Number, Field(gt=0, le=24 * 3600)] = 300.0
    concurrent_loads: Count = 4
    load_on_demand: tuple[Annotated[str, AfterValidator(_check_pattern)], ...] = ()
    memory_budget_bytes: Annotated[Whole, Field(ge=0, le=2**62)] = 0
    device_budgets: tuple[Annotated[str, AfterValidator(_check_budget)], ...] = ()
    residence_secs: Seconds = 5.0
    room_timeout_secs: Seconds = 10.0

    @property
    def budgets(self) -> dict[str, int]:
        """Bytes by device, of those that are bounded."""
        found = dict(read_budget(text) for text in self.device_budgets)
        return found | ({"cpu": self.memory_budget_bytes} if self.memory_budget_bytes else {})

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(self._find_problems())
        return self

    def _find_problems(self) -> Iterator[Problem]:
        if self.load_models and self.control_mode is not ControlMode.EXPLICIT:
            text = f"found {list(self.load_models)}; it needs control_mode explicit, found {self.control_mode}"
            yield Problem(("load_models",), text)
        if "*" in self.load_models and len(self.load_models) > 1:
            yield Problem(("load_models",), f"found {list(self.load_models)}; '*' must stand alone")
        devices = [read_budget(text)[0] for text in self.device_budgets]
        if len(devices) > len(set(devices)):
            yield Problem(("device_budgets",), f"found {list(self.device_budgets)}; a device has one budget")
        for index, name in enumerate(self.load_models):
            try:
                check_name(name)
            except ValueError as error:
                yield Problem(("load_models", index), f"found {name!r}; {error}")


class ExecutionConfig(Section):
    """How models are run where their own configuration does not say.

    ``instances`` per model; ``default_max_batch_size`` for models whose artefact can batch (0: never).
    ``allow_code`` permits what runs code of its author's choice: pickled artefacts, and artefacts of any kind that come
    with a load request (without it a request brings data only, such as ONNX files). ``backends`` adds backends written
    ``module:attribute`` to those installed as plug-ins. After ``switch_interval_us`` a thread that computes in Python
    hands the interpreter to the next that waits for it. With ``scheduling`` realtime the I/O threads of the gRPC door
    go before all other threads of the system, which needs a privilege. ``resources`` says how much there is of what
    instances hold while they run (``rate_limiter`` of their group): ``NAME:COUNT``, or ``NAME:COUNT:GPU`` for one GPU.
    """

    instances: Annotated[Whole, Field(ge=1, le=1024)] = 1
    resources: tuple[Annotated[str, AfterValidator(_check_resource)], ...] = ()
    default_max_batch_size: Annotated[Whole, Field(ge=0, le=2**31 - 1)] = 32
    allow_code: Flag = False
    backends: tuple[Plugin, ...] = ()
    switch_interval_us: Annotated[Whole, Field(ge=10, le=1_000_000)] = 500
    scheduling: Scheduling = Scheduling.PLAIN


class LimitsConfig(Section):
    """Bounds that protect the server, for all doors together.

    ``max_queue_size`` holds per model where its own configuration gives no bound. A stream of answers ends when its
    client takes none for ``stream_stall_secs`` (0: any time) while the model waits to send more.
    """

    max_concurrent_streams: Count = 1024
    max_header_bytes: Annotated[Whole, Field(ge=1024, le=1024 * 1024)] = 16 * 1024
    max_queue_size: Annotated[Whole, Field(ge=1, le=2**31 - 1)] = 100_000
    stream_stall_secs: Seconds = 30.0


def _read_keys(value: object) -> object:
    # YAML and the variables of the environment make booleans of such words; Triton's option is one.
    if isinstance(value, bool):
        return "on" if value else "off"
    return {"true": "on", "1": "on", "false": "off", "0": "off"}.get(value, value) if isinstance(value, str) else value


def _check_keys(text: str) -> str:
    if text not in ("off", "on") and not _KEY_PREFIX.fullmatch(text):
        raise ValueError("should be off, on, or a prefix of keys such as /camera_")
    return text


class SharedMemoryConfig(Section):
    """Whether clients may register system shared memory, and how much.

    ``keys`` is ``off``, ``on`` (any object that the server's user may open) or a prefix that the keys of objects
    must have, such as ``/camera_``. ``max_bytes`` bounds the registered regions, and what requests copy out of them.
    """

    keys: Annotated[str, BeforeValidator(_read_keys), AfterValidator(_check_keys)] = "off"
    max_regions: Annotated[Whole, Field(ge=1, le=10_000)] = 256
    max_bytes: Annotated[Whole, Field(ge=1, le=2**48)] = 1 << 30


def _check_cache(text: str) -> str:
    if not _CACHE_NAME.fullmatch(text) and not _PLUGIN.fullmatch(text):
        raise ValueError("should be off, local, redis, the name of an installed cache, or 'module:attribute'")
    return text


class CacheConfig(Section):
    """Where answers of models with ``response_cache { enable: true }`` are kept, for all of them together.

    ``kind`` is ``off``, ``local`` (this process's memory), ``redis``, the name of an installed cache, or
    ``module:attribute``. ``ttl_secs`` 0 means that answers do not age. ``timeout_ms`` bounds how long a request waits
    for a cache outside of this process.
    """

    kind: Annotated[str, BeforeValidator(_read_keys), AfterValidator(_check_cache)] = "off"
    size_bytes: Annotated[Whole, Field(ge=1024, le=2**48)] = 64 * 1024 * 1024
    ttl_secs: Seconds = 0.0
    timeout_ms: Annotated[Whole, Field(ge=1, le=10_000)] = 100
    redis: RedisConfig = RedisConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "redis" and not self.redis.host:
            raise_problems([Problem(("redis", "host"), "is missing; kind redis needs the server's host, or unix:PATH")])
        return self


class LogConfig(Section):
    """What the server writes about itself, to standard error.

    Requests that take ``slow_us`` or longer (0: none) are written down with their phases, at most
    ``slow_lines_per_s``; of the others only the number.
    """

    level: LogLevel = LogLevel.INFO
    format: LogFormat = LogFormat.TEXT
    slow_us: Annotated[Whole, Field(ge=0, le=10**12)] = 0
    slow_lines_per_s: Annotated[Whole, Field(ge=1, le=1000)] = 10


def _check_endpoint(text: str) -> str:
    if text and not _ENDPOINT.fullmatch(text):
        raise ValueError("should be the address of a receiver such as http://127.0.0.1:4318")
    return text


class TraceConfig(Section):
    """Where traces go, and of what; without ``endpoint`` nothing is traced.

    ``endpoint`` is an OTLP receiver over HTTP, such as ``http://127.0.0.1:4318``. One request in ``rate`` (0: none)
    of those whose callers do not trace, until ``count`` traces are made (-1: without end); clients may change
    ``level``, ``rate`` and ``count`` with TraceSetting.
    """

    endpoint: Annotated[str, Field(max_length=2000), AfterValidator(_check_endpoint)] = ""
    level: TraceLevel = TraceLevel.TIMESTAMPS
    rate: Annotated[Whole, Field(ge=0, le=2**32 - 1)] = 1000
    count: Annotated[Whole, Field(ge=-1, le=2**31 - 1)] = -1
    service: Annotated[str, Field(min_length=1, max_length=200)] = "aiorchestrator"


class ServerConfig(Section):
    """Everything the server can be told; every value has a default that is safe on a laptop.

    ``id`` is the name that ServerMetadata gives.
    """

    id: Annotated[str, Field(min_length=1, max_length=200)] = "aiorchestrator"
    grpc: GrpcConfig = GrpcConfig()
    http: HttpConfig = HttpConfig()
    metrics: MetricsConfig = MetricsConfig()
    repository: RepositoryConfig = RepositoryConfig()
    registry: RegistryConfig = RegistryConfig()
    lifecycle: LifecycleConfig = LifecycleConfig()
    execution: ExecutionConfig = ExecutionConfig()
    limits: LimitsConfig = LimitsConfig()
    shared_memory: SharedMemoryConfig = SharedMemoryConfig()
    cache: CacheConfig = CacheConfig()
    log: LogConfig = LogConfig()
    trace: TraceConfig = TraceConfig()
    security: SecurityConfig = SecurityConfig()

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        raise_problems(self._find_problems((info.context or {}).get("unknown", ())))
        return self

    def _find_problems(self, unknown: Collection[str]) -> Iterator[Problem]:
        """``unknown`` are sections that hold a default because what was written is wrong: nothing follows from them."""
        taken: dict[tuple[str, int], str] = {}
        doors = (("grpc", self.grpc), ("http", self.http), ("metrics", self.metrics))
        for name, door in doors:
            address = (door.host, door.port)
            if not door.enabled or door.port == 0 or name in unknown:
                continue
            if address in taken:
                text = f"found {door.port}, which {taken[address]}.port on {door.host} has already; ports must differ"
                yield Problem((name, "port"), text)
            taken.setdefault(address, name)
        if not self.grpc.enabled and not self.http.enabled:
            yield Problem(("grpc", "enabled"), "found false, and http.enabled too; at least one door must be open")
        if not {"execution", "grpc"} & set(unknown):
            has_threads = self.grpc.enabled and self.grpc.transport is Transport.NATIVE and self.grpc.io_threads > 0
            if self.execution.scheduling is Scheduling.REALTIME and not has_threads:
                text = "found realtime, which is for I/O threads; it needs gRPC with transport native and io_threads"
                yield Problem(("execution", "scheduling"), f"{text} of at least 1")
        if not self.security.insecure and "security" not in unknown:
            for name, _ in doors:
                if name not in unknown and (lack := self.find_exposure(name)):
                    yield Problem((name, "host"), lack)

    def find_exposure(self, door: str) -> str:
        """Why a door (``grpc``, ``http`` or ``metrics``) is not fit for the address it listens on; empty if it is."""
        config: GrpcConfig | HttpConfig | MetricsConfig = getattr(self, door)
        if not config.enabled or _is_local(config.host):
            return ""
        lacks = []
        if not config.tls.is_enabled:
            lacks.append(f"TLS ({door}.tls.certificate and key)")
        if not self.security.enabled and not config.tls.require_client_auth:
            lacks.append(f"callers who say who they are (security.enabled, or {door}.tls.require_client_auth)")
        if not lacks:
            return ""
        return (
            f"found {config.host!r}, which other machines reach; that needs {' and '.join(lacks)}, or --insecure "
            "(security.insecure: true) where something else protects this port"
        )


def _is_local(host: str) -> bool:
    """Whether only this machine's own programs can connect there."""
    if host.startswith(("unix:", "unix-abstract:")) or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
