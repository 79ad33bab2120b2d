"""A cache in a Redis server, which several servers may share and which outlives them."""

from __future__ import annotations

from typing import Any, Final, cast

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from aiorch_server.cache.base import EntryUnusable, ResponseCache
from aiorch_server.config.redis import UNIX, RedisConfig

#: Nobody asks for the answers of a model that was replaced, and nothing else would take them away.
LONGEST_LIFE_S: Final = 24 * 3600.0


class RedisCache(ResponseCache):
    """Entries under ``<key_prefix>:<key>``, each with a time to live: ``ttl_s``, or a day where that is 0.

    How much is held in all is Redis's own business (``maxmemory``). One command is tried once, on one connection of a
    bounded pool; a connection whose answer was not read to its end is closed, so that nobody gets another's answer.
    """

    def __init__(self, config: RedisConfig, *, ttl_s: float, timeout_s: float) -> None:
        self._prefix = f"{config.key_prefix}:".encode()
        self._ttl_ms = max(1, round((ttl_s or LONGEST_LIFE_S) * 1000))
        self._max_entry_bytes = config.max_entry_bytes
        self._client: Redis = Redis(connection_pool=_make_pool(config, timeout_s))
        self.check_timeout_s = config.connect_timeout_ms / 1000 + timeout_s

    async def get(self, key: bytes) -> bytes | None:
        """See ResponseCache.get; of an entry that is too large, not more than shows that it is."""
        try:
            # Unlike GET it does not bring what somebody else has put there in any size.
            found = await self._client.getrange(cast(str, self._prefix + key), 0, self._max_entry_bytes)
        except ResponseError as error:
            raise EntryUnusable(str(error)) from error
        return cast(bytes, found) or None

    async def put(self, key: bytes, value: bytes) -> None:
        """See ResponseCache.put; what is too large is not kept."""
        if len(value) > self._max_entry_bytes:
            return
        try:
            await self._client.set(self._prefix + key, value, px=self._ttl_ms)
        except ResponseError as error:  # out of memory, for example: what is there may be read
            raise EntryUnusable(str(error)) from error

    async def check(self) -> None:
        """A PING."""
        answer: Any = self._client.ping()  # its type differs between versions
        await answer

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()
        await self._client.connection_pool.disconnect()


def _make_pool(config: RedisConfig, timeout_s: float) -> BlockingConnectionPool:
    options: dict[str, Any] = {
        "db": config.db,
        "username": config.user or None,
        "password": config.password.get_secret_value() or None,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": config.connect_timeout_ms / 1000,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    if config.host.startswith(UNIX):
        options |= {"connection_class": UnixDomainSocketConnection, "path": config.host.removeprefix(UNIX)}
    else:
        options |= {"connection_class": Connection, "host": config.host, "port": config.port}
    if config.use_tls:
        options |= {
            "connection_class": SSLConnection,
            "ssl_check_hostname": True,
            "ssl_ca_certs": _write(config.tls_root),
            "ssl_certfile": _write(config.tls_certificate),
            "ssl_keyfile": _write(config.tls_key),
        }
    return BlockingConnectionPool(config.pool_size, config.wait_timeout_ms / 1000, **options)


def _write(path: object) -> str | None:
    return None if path is None else str(path)
