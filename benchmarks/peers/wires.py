"""How a server is spoken to: what h2load posts, and how a real client checks the answers."""

from __future__ import annotations

import http.client
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import grpc

from benchmarks.peers.workload import Workload, WrongAnswer

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
CHECKED = 48
AT_ONCE = 16
_TIMEOUT_S = 60.0


class Wire(Protocol):
    """A protocol of the comparison."""

    @property
    def is_http1(self) -> bool:
        """One request at a time on each connection: a shape of c x s becomes c*s connections."""

    @property
    def headers(self) -> Sequence[str]:
        """What h2load must send beside the payload."""

    def url(self, port: int) -> str:
        """Where h2load posts to."""

    def payload(self, workload: Workload) -> bytes:
        """What h2load posts: the workload's first row."""

    def ask(self, workload: Workload, port: int) -> int:
        """Posts the payload once; the bytes of DATA that its right answer takes.

        Raises WrongAnswer, grpc.RpcError, OSError or http.client.HTTPException.
        """

    def check(self, workload: Workload, port: int) -> int:
        """Asks many different requests, 16 at a time, and then ``ask``; the same result and errors."""


@dataclass(frozen=True, slots=True)
class Grpc:
    """V2 ModelInfer with raw contents; with ``root`` (a PEM file that signs 127.0.0.1) over TLS."""

    root: Path | None = None
    is_http1: bool = False
    headers: Sequence[str] = ("content-type: application/grpc", "te: trailers")

    def url(self, port: int) -> str:
        return f"{'https' if self.root else 'http'}://127.0.0.1:{port}{MODEL_INFER}"

    def payload(self, workload: Workload) -> bytes:
        message = workload.request([0])
        return struct.pack(">BI", 0, len(message)) + message

    def ask(self, workload: Workload, port: int) -> int:
        with self._open(port) as channel:
            response: bytes = channel.unary_unary(MODEL_INFER)(workload.request([0]), timeout=_TIMEOUT_S)
        workload.compare(response, [0], "bench")
        return 5 + len(response)

    def check(self, workload: Workload, port: int) -> int:
        with self._open(port) as channel:
            call = channel.unary_unary(MODEL_INFER)
            for start in range(0, CHECKED, AT_ONCE):
                asked = []
                for number in range(start, start + AT_ONCE):
                    rows = [(number + row) % workload.row_count for row in range(1 + number % 3)]
                    future = call.future(workload.request(rows, f"check-{number}"), timeout=_TIMEOUT_S)
                    asked.append((f"check-{number}", rows, future))
                for request_id, rows, future in asked:
                    workload.compare(future.result(), rows, request_id)
        return self.ask(workload, port)

    def _open(self, port: int) -> grpc.Channel:
        if self.root is None:
            return grpc.insecure_channel(f"127.0.0.1:{port}")
        return grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(self.root.read_bytes()))


@dataclass(frozen=True, slots=True)
class RawHttp:
    """HTTP/1.1, a row's bytes up and its output's bytes down: the cheapest thing such a server can be asked."""

    path: str = "/inference"
    is_http1: bool = True
    headers: Sequence[str] = ("content-type: application/octet-stream",)

    def url(self, port: int) -> str:
        return f"http://127.0.0.1:{port}{self.path}"

    def payload(self, workload: Workload) -> bytes:
        return workload.body(0)

    def ask(self, workload: Workload, port: int) -> int:
        return self._ask_row(workload, port, 0)

    def check(self, workload: Workload, port: int) -> int:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = [
                pool.submit(self._ask_row, workload, port, number % workload.row_count) for number in range(CHECKED)
            ]
            for future in futures:
                future.result()
        return self.ask(workload, port)

    def _ask_row(self, workload: Workload, port: int, index: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
        try:
            connection.request("POST", self.path, workload.body(index), {"content-type": "application/octet-stream"})
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise WrongAnswer(f"{workload.model}: HTTP status {response.status}: {body[:200]!r}")
        workload.compare_body(body, index)
        return len(body)
