"""Builds the server's configuration: defaults < file < environment ``AIORCH_*`` < command line.

The only module of the package that reads the environment. Every setting has a flat name made of its path
(``grpc.port`` is ``grpc_port``, ``AIORCH_GRPC_PORT``, ``--grpc-port``); settings that Triton has too are also known by
Triton's name. Paths are relative to the working directory.
"""

from __future__ import annotations

import logging
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel

from aiorch_server.config.problems import Location, Problem, format_problems, suggest, validate_whole
from aiorch_server.config.server import ServerConfig
from aiorch_server.errors import InvalidSettings

logger = logging.getLogger(__name__)

PREFIX = "AIORCH_"
CONFIG_VARIABLE = "AIORCH_CONFIG"
#: The credentials of commands that call a server; no setting of the server's own.
TOKEN_VARIABLE = "AIORCH_TOKEN"
HEADERS_VARIABLE = "AIORCH_HEADERS"
LARGEST_FILE_BYTES = 1024 * 1024
#: Triton's names (and short ones of ours) for settings.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "model_repository": ("repository", "paths"),
    "model_control_mode": ("lifecycle", "control_mode"),
    "load_model": ("lifecycle", "load_models"),
    "repository_poll_secs": ("lifecycle", "poll_secs"),
    "exit_timeout_secs": ("lifecycle", "exit_timeout_secs"),
    "model_load_timeout_secs": ("lifecycle", "load_timeout_secs"),
    "model_load_thread_count": ("lifecycle", "concurrent_loads"),
    "strict_readiness": ("lifecycle", "is_readiness_strict"),
    "load_on_demand": ("lifecycle", "load_on_demand"),
    "memory_budget_bytes": ("lifecycle", "memory_budget_bytes"),
    "device_budget": ("lifecycle", "device_budgets"),
    "allow_grpc": ("grpc", "enabled"),
    "grpc_address": ("grpc", "host"),
    "grpc_server_cert": ("grpc", "tls", "certificate"),
    "grpc_server_key": ("grpc", "tls", "key"),
    "grpc_root_cert": ("grpc", "tls", "root"),
    "grpc_use_ssl_mutual": ("grpc", "tls", "require_client_auth"),
    "transport": ("grpc", "transport"),
    "io_threads": ("grpc", "io_threads"),
    "reuse_port": ("grpc", "reuse_port"),
    "grpc_keepalive_time": ("grpc", "keepalive_time_ms"),
    "grpc_keepalive_timeout": ("grpc", "keepalive_timeout_ms"),
    "grpc_http2_min_recv_ping_interval_without_data": ("grpc", "http2_min_ping_interval_without_data_ms"),
    "grpc_max_connection_age": ("grpc", "max_connection_age_ms"),
    "grpc_max_connection_age_grace": ("grpc", "max_connection_age_grace_ms"),
    "grpc_restricted_protocol": ("grpc", "restricted_protocols"),
    "allow_http": ("http", "enabled"),
    "http_address": ("http", "host"),
    "http_restricted_api": ("http", "restricted_apis"),
    "allow_metrics": ("metrics", "enabled"),
    "metrics_address": ("metrics", "host"),
    "instances": ("execution", "instances"),
    "default_max_batch_size": ("execution", "default_max_batch_size"),
    "rate_limit_resource": ("execution", "resources"),
    "allow_code": ("execution", "allow_code"),
    "scheduling": ("execution", "scheduling"),
    "backends": ("execution", "backends"),
    "allow_client_shm": ("shared_memory", "keys"),
    "shared_memory": ("shared_memory", "keys"),
    "cache": ("cache", "kind"),
    "insecure": ("security", "insecure"),
    "registry": ("registry", "url"),
    "artefacts": ("registry", "artefacts"),
}
#: What stands between the elements of a list that is written as one text, where that is no comma.
_SEPARATORS: Mapping[tuple[str, ...], str] = {
    ALIASES["model_repository"]: os.pathsep,
    ALIASES["grpc_restricted_protocol"]: "\n",
    ALIASES["http_restricted_api"]: "\n",
}
# Read elsewhere: by setup.py, and by this module for the file's name.
_OTHER_VARIABLES = {CONFIG_VARIABLE, TOKEN_VARIABLE, HEADERS_VARIABLE, "AIORCH_DEBUG", "AIORCH_SANITIZE"}
# Kubernetes sets such variables for each of its services; one named `aiorch` or `aiorch-grpc` would meet our names.
_KUBERNETES = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT_\d+_(TCP|UDP|SCTP)")
_KUBERNETES_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
_BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def load_server_config(
    options: Mapping[str, Any] | None = None,
    *,
    sources: Mapping[str, str] | None = None,
    file: str | os.PathLike[str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> ServerConfig:
    """The configuration from all sources.

    ``options`` are settings by flat name as the command line gives them (``grpc-port`` and ``grpc_port`` are the
    same); None means "not given". ``sources`` names the option for those that have none of their own. ``file`` is
    YAML or TOML with one table per section, by default the one that ``AIORCH_CONFIG`` names. ``environment`` is the
    process's by default; lists in it are separated by commas, paths by ``os.pathsep``, restrictions stand on
    lines of their own. Raises InvalidSettings with
    all problems, each with the source of the value.
    """
    variables = os.environ if environment is None else environment
    settings = _Settings()
    path = file or variables.get(CONFIG_VARIABLE)
    if path:
        settings.add_file(Path(path))
    settings.add_environment(variables)
    settings.add_options(options or {}, sources or {})
    return settings.build()


def read_token_variable() -> str:
    """What ``AIORCH_TOKEN`` holds, empty where it is not set."""
    return os.environ.get(TOKEN_VARIABLE, "").strip()


def read_headers_variable() -> str:
    """What ``AIORCH_HEADERS`` holds, empty where it is not set."""
    return os.environ.get(HEADERS_VARIABLE, "")


def setting_names() -> Mapping[str, tuple[str, ...]]:
    """All flat names, with the path of the setting in ServerConfig."""
    return {**{"_".join(path): path for path in _list_leaves(ServerConfig)}, **ALIASES}


class _Settings:
    """Values by path, the latest source winning, each with the words for where it came from."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._sources: dict[Location, str] = {}
        self._problems: list[Problem] = []
        self._names = setting_names()

    def add_file(self, path: Path) -> None:
        """Adds the settings of a YAML or TOML file."""
        try:
            self._add_tree((), _read_file(path), f"file {path}")
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self._problems.append(Problem((), f"configuration file {path}: {reason}"))

    def add_environment(self, variables: Mapping[str, str]) -> None:
        """Adds the ``AIORCH_*`` variables; unknown ones are told to the log, since others may own them."""
        for variable in sorted(variables):
            text = variables[variable]
            if not variable.startswith(PREFIX) or variable in _OTHER_VARIABLES:
                continue
            path = self._names.get(variable.removeprefix(PREFIX).lower())
            if path is not None and not _KUBERNETES_ADDRESS.match(text):
                self._set(path, text, f"environment {variable}")
            elif path is None and not _KUBERNETES.search(variable) and not _KUBERNETES_ADDRESS.match(text):
                hint = suggest(variable.removeprefix(PREFIX).lower(), self._names)
                logger.warning("environment %s is no setting and is passed over%s", variable, hint)

    def add_options(self, options: Mapping[str, Any], sources: Mapping[str, str]) -> None:
        """Adds settings of the command line; ``sources`` names those options that are not named after the setting."""
        for option, value in options.items():
            if value is None:
                continue
            name = option.lstrip("-").replace("-", "_").replace(".", "_")
            source = f"option {sources.get(option, '--' + name.replace('_', '-'))}"
            path = self._names.get(name)
            if path is None:
                self._problems.append(Problem((), f"{source}: there is no such setting{suggest(name, self._names)}"))
            else:
                self._set(path, value, source)

    def build(self) -> ServerConfig:
        """The configuration; raises InvalidSettings."""
        config, found = validate_whole(ServerConfig, self._values)
        problems = self._problems + [self._name_source(problem) for problem in found]
        if config is None or problems:
            raise InvalidSettings(f"the server's configuration is wrong: {format_problems(problems)}")
        return config

    def _name_source(self, problem: Problem) -> Problem:
        for end in range(len(problem.location), 0, -1):
            source = self._sources.get(problem.location[:end])
            if source is not None:
                return Problem(problem.location, f"{problem.text} (from {source})")
        return problem

    def _add_tree(self, prefix: tuple[str, ...], tree: Mapping[str, Any], source: str) -> None:
        for key, value in tree.items():
            path = (*prefix, key)
            if not prefix and key not in ServerConfig.model_fields and key in self._names:
                text = f"a file has sections: write {_nest(self._names[key])} (from {source})"
                self._problems.append(Problem((key,), text))
            elif isinstance(value, Mapping) and _is_section(path):
                self._add_tree(path, value, source)
            else:
                self._set(path, value, source)

    def _set(self, path: tuple[str, ...], value: Any, source: str) -> None:
        section = self._values
        for step in path[:-1]:
            section = section.setdefault(step, {})
            if not isinstance(section, dict):
                return  # a file wrote a plain value for a whole section: that is the problem to tell
        section[path[-1]] = _read_text(path, value) if isinstance(value, str) else value
        self._sources[path] = source


def _read_file(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE_BYTES + 1)
    if len(content) > LARGEST_FILE_BYTES:
        raise ValueError(f"is larger than {LARGEST_FILE_BYTES} bytes")
    text = content.decode("utf-8-sig")
    if path.suffix == ".toml":
        return tomllib.loads(text)
    if path.suffix in (".yaml", ".yml"):
        from aiorch_server.config.strict_yaml import read_yaml  # a server without such files does without its parser

        return read_yaml(text, path.name)
    raise ValueError("must end in .yaml, .yml or .toml")


def _read_text(path: tuple[str, ...], text: str) -> Any:
    """Text as the value it stands for: booleans and lists need it, numbers are read by the sections themselves."""
    annotation = _find_annotation(path)
    if annotation is bool:
        return _BOOLEANS.get(text.strip().lower(), text)
    if get_origin(annotation) is tuple:
        return [part.strip() for part in text.split(_SEPARATORS.get(path, ",")) if part.strip()]
    return text


def _nest(path: tuple[str, ...]) -> str:
    return f"{path[0]}: {{{_nest(path[1:])}}}" if len(path) > 1 else f"{path[0]}: ..."


def _find_annotation(path: tuple[str, ...]) -> Any:
    annotation: Any = ServerConfig
    for step in path:
        field = annotation.model_fields.get(step) if _is_model(annotation) else None
        if field is None:
            return None
        annotation = field.annotation
    return annotation


def _is_section(path: tuple[str, ...]) -> bool:
    return _is_model(_find_annotation(path))


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _list_leaves(section: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        annotation: Any = field.annotation
        if _is_model(annotation):
            yield from _list_leaves(annotation, (*prefix, name))
        else:
            yield (*prefix, name)
