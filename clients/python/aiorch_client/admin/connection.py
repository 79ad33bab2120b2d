"""What the parts of the blocking admin client share."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import grpc
from aiorch_proto.admin.v1.service import AdminStub

from aiorch_client.admin.calls import ADMIN_RETRIES, AdminLayer, Call, ListCall
from aiorch_client.admin.push import SendArchive
from aiorch_client.channel import TlsConfig
from aiorch_client.connection import Connection
from aiorch_client.retry import RetryPolicy
from aiorch_client.steps import Send

T = TypeVar("T")
Item = TypeVar("Item")


class AdminConnection(Connection):
    """A connection to the admin services of one server; threads may share it.

    Arguments as of ``Client``. Each change carries an idempotency key of its own, so that trying it again after a
    failure of the network changes nothing twice.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:8001",
        *,
        tls: TlsConfig | None = None,
        token: str | None = None,
        metadata: Mapping[str, str | bytes] | Sequence[tuple[str, str | bytes]] = (),
        timeout_s: float = 60.0,
        retry: RetryPolicy | None = None,
    ) -> None:
        super().__init__(target, tls=tls, token=token, metadata=metadata)
        self._layer = AdminLayer(
            timeout_s=timeout_s, retry=retry or ADMIN_RETRIES, clock_s=time.monotonic, draw=random.random
        )
        self._stub = AdminStub(self._channel)

    def _call(self, call: Call[T], timeout_s: float | None) -> T:
        return self._run(self._layer.call(call, timeout_s))

    def _list(self, call: ListCall[Item], timeout_s: float | None) -> Iterator[Item]:
        token = ""
        while True:
            items, token = self._run(self._layer.list_page(call, token, timeout_s))
            yield from items
            if not token:
                return

    def _find(self, method: str) -> Any:
        service, _, name = method.partition(".")
        return getattr(getattr(self._stub, service), name)

    def _invoke(self, step: Send) -> Any:
        if not isinstance(step, SendArchive):
            return super()._invoke(step)
        self._check_open()
        failures: list[Exception] = []
        call = self._find(step.method).future(
            step.messages(failures), timeout=step.timeout_s, metadata=self._metadata
        )  # fmt: skip
        try:
            return call.result()
        except grpc.RpcError:
            if failures:
                raise failures[0] from None
            self._check_open()
            raise
        finally:
            call.cancel()
