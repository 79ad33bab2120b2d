"""The section of the response cache in a Redis server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, FilePath, SecretStr, model_validator

from aiorch_server.config.problems import Problem, raise_problems
from aiorch_server.config.section import Flag, Section, Whole

UNIX = "unix:"
#: Never without end: a request must not wait for a cache.
Milliseconds = Annotated[Whole, Field(ge=1, le=60_000)]


def _read_secret(value: object) -> object:
    # YAML reads a password of digits as a number.
    return str(value) if type(value) is int else value


class RedisConfig(Section):
    """A Redis server that keeps answers for any number of servers; ``host`` may be ``unix:PATH``.

    ``connect_timeout_ms`` bounds the making of a connection (no request waits for it longer than ``cache.timeout_ms``),
    ``wait_timeout_ms`` the wait for one of ``pool_size``. Answers of more than ``max_entry_bytes`` are not kept. With
    ``use_tls`` the server's certificate must be valid for ``host``, by ``tls_root`` or else the system's authorities.
    """

    host: Annotated[str, Field(max_length=1000)] = ""
    port: Annotated[Whole, Field(ge=1, le=65535)] = 6379
    user: Annotated[str, Field(max_length=1000)] = ""
    password: Annotated[SecretStr, BeforeValidator(_read_secret)] = SecretStr("")
    db: Annotated[Whole, Field(ge=0, le=2**31 - 1)] = 0
    connect_timeout_ms: Milliseconds = 1000
    wait_timeout_ms: Milliseconds = 100
    pool_size: Annotated[Whole, Field(ge=1, le=1024)] = 8
    max_entry_bytes: Annotated[Whole, Field(ge=1024, le=512 * 1024 * 1024)] = 4 * 1024 * 1024
    key_prefix: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[!-~]+$")] = "aiorch"
    use_tls: Flag = False
    tls_root: FilePath | None = None
    tls_certificate: FilePath | None = None
    tls_key: FilePath | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        raise_problems(self._find_problems())
        return self

    def _find_problems(self) -> Iterator[Problem]:
        for name in ("tls_root", "tls_certificate", "tls_key"):
            if not self.use_tls and getattr(self, name) is not None:
                yield Problem((name,), "has no use without use_tls")
        if self.tls_key is not None and self.tls_certificate is None:
            yield Problem(("tls_certificate",), "is missing; a key needs its certificate")
        if self.use_tls and self.host.startswith(UNIX):
            yield Problem(("use_tls",), "found true; a unix socket has no TLS")
