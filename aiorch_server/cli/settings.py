"""From the options of ``aiorch serve`` to settings by the names that ``config.load`` knows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiorch_server.cli.output import UsageError
from aiorch_server.config.load import load_server_config, setting_names
from aiorch_server.config.problems import is_secret, suggest
from aiorch_server.config.server import ServerConfig
from aiorch_server.errors import InvalidSettings

_TLS_SETTINGS = ("grpc_server_cert", "grpc_server_key", "grpc_root_cert", "grpc_use_ssl_mutual")
#: Triton's names for what its caches take, and ours.
_CACHE_SETTINGS = {
    "local": {"size": "cache_size_bytes"},
    "redis": {
        "host": "cache_redis_host",
        "port": "cache_redis_port",
        "user": "cache_redis_user",
        "password": "cache_redis_password",
        "db": "cache_redis_db",
        "connect_timeout": "cache_redis_connect_timeout_ms",
        "socket_timeout": "cache_timeout_ms",
        "wait_timeout": "cache_redis_wait_timeout_ms",
        "pool_size": "cache_redis_pool_size",
        "tls_enabled": "cache_redis_use_tls",
        "cacert": "cache_redis_tls_root",
        "cert": "cache_redis_tls_certificate",
        "key": "cache_redis_tls_key",
    },
}
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def build_config(
    options: Mapping[str, Any],
    *,
    file: Path | None,
    use_ssl: str | None,
    log_verbose: int | None,
    backend_config: Sequence[str],
    cache_config: Sequence[str] = (),
    others: Sequence[str],
) -> ServerConfig:
    """The server's configuration from all sources; UsageError with every problem.

    ``options`` are settings by name, None where not given. The others are options of Triton that have no setting of
    their own: ``use_ssl`` false leaves the TLS files unused, ``log_verbose`` above 0 means level debug,
    ``backend_config`` and ``cache_config`` entries are refused unless there is a setting that means the same.
    ``others`` are NAME=VALUE.
    """
    settings = {name: value for name, value in options.items() if value is not None and value != []}
    known = setting_names()
    given = {known[name]: name for name in settings}
    told = _split(others, "--set")
    strange = [written for written, _ in told if _name(written) not in known]
    if strange:
        each = (f"--set {written}: there is no such setting{suggest(_name(written), known)}" for written in strange)
        raise UsageError(f"{'; '.join(each)} (docs/settings.md has all)")
    sources: dict[str, str] = {}
    entries = [
        *((f"--set {written}", written, value) for written, value in told),
        *(("--backend-config", *entry) for entry in _translate(backend_config)),
        *(("--cache-config", *entry) for entry in _translate_cache(cache_config)),
    ]
    for source, written, value in entries:
        name = _name(written)
        name = given.setdefault(known.get(name, (name,)), name)
        if name not in settings:
            sources[name] = source
        if str(settings.setdefault(name, value)) != value:
            found = "" if is_secret(known.get(name, ())) else f", as {settings[name]} and as {value}"
            raise UsageError(f"setting {name} is given twice{found}")
    if log_verbose:
        settings.setdefault("log_level", "debug")
    wants_ssl = None if use_ssl is None else _parse_flag(use_ssl, "--grpc-use-ssl")
    if wants_ssl is False:
        for name in _TLS_SETTINGS:
            settings.pop(name, None)
    try:
        config = load_server_config(settings, sources=sources, file=file)
    except InvalidSettings as error:
        raise UsageError(str(error)) from error
    if wants_ssl and not config.grpc.tls.is_enabled:
        raise UsageError("--grpc-use-ssl true needs --grpc-server-cert FILE and --grpc-server-key FILE")
    if wants_ssl is False and config.grpc.tls.is_enabled:
        raise UsageError("--grpc-use-ssl false contradicts the certificate in the configuration file or environment")
    if not config.repository.paths and not config.registry.is_enabled:
        raise UsageError(
            "no model repository is given: add --model-repository FOLDER (it holds one folder per model), or "
            "--registry URL (sqlite:///aiorch.db makes one)"
        )
    return config


def _name(written: str) -> str:
    """A setting's flat name, however it is written: ``--grpc-port``, ``grpc.port``."""
    return written.lstrip("-").replace("-", "_").replace(".", "_")


def _translate(entries: Sequence[str]) -> list[tuple[str, str]]:
    """Entries of ``--backend-config``: the one for all backends is a setting here, those for one belong to models."""
    translated = []
    for key, value in _split(entries, "--backend-config"):
        if key not in ("default-max-batch-size", "default_max_batch_size"):
            raise UsageError(
                f"--backend-config {key}={value} has no effect in this server and is refused: write backend settings "
                "into the model's configuration (parameters), or use --backend-config default-max-batch-size=N"
            )
        translated.append(("default_max_batch_size", value))
    return translated


def _translate_cache(entries: Sequence[str]) -> list[tuple[str, str]]:
    """Entries of ``--cache-config``: the cache's name and any of its settings, no part of which may be told."""
    translated = []
    for entry in entries:
        name, *settings = re.split(r",(?=\w+=)", entry)
        known = _CACHE_SETTINGS.get(name)
        if known is None or not settings:
            raise UsageError(
                f"--cache-config {name.partition(',')[0]}: expected local,size=BYTES or redis,host=HOST,port=PORT; for "
                "other caches write --cache NAME, and see --set for their settings"
            )
        translated.append(("cache", name))
        for setting in settings:
            key, _, value = setting.partition("=")
            if key not in known or not value:
                what = f"{key} needs a value" if key in known else f"there is no {key}"
                raise UsageError(f"--cache-config {name}: {what}; known here: {', '.join(known)}")
            translated.append((known[key], value))
    return translated


def _split(entries: Sequence[str], option: str) -> list[tuple[str, str]]:
    pairs = []
    for entry in entries:
        key, separator, value = entry.partition("=")
        if not separator or not key:
            raise UsageError(f"{option} {entry}: expected NAME=VALUE")
        pairs.append((key, value))
    return pairs


def _parse_flag(text: str, option: str) -> bool:
    if text.lower() not in (*_TRUE, *_FALSE):
        raise UsageError(f"{option} {text}: expected true or false")
    return text.lower() in _TRUE
