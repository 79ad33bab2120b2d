"""What authorization costs a request of the hot path, in CPU: servers that ask who calls, and servers that do not.

All servers take turns on one CPU while 32 clients on another ask for the echo of FP32 [4], one request after the other.
Those that ask have a `security:` section as an operator writes it: an issuer with a key set in a file, API keys, roles
and a quota. How clients compress a header that is the same in each request can cost more than asking for it, so there
are clients of both kinds: most index it (grpc-go, grpc-java), h2load and grpc's C core send it whole each time.
"""

from __future__ import annotations

import json
import secrets
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from rich.console import Console

from aiorch_server.security.api_keys import make_key
from benchmarks.peers.h2load import LoadFailed
from benchmarks.peers.measure import RunningServer, make_load
from benchmarks.peers.process import ServerProcess, find_free_port
from benchmarks.peers.servers import Certificate, Situation, make_certificate, plan_aiorch
from benchmarks.peers.wires import MODEL_INFER
from benchmarks.peers.workload import Workload, make_identity
from benchmarks.scenarios.echoes import Echoes
from benchmarks.scenarios.frames import Compression
from benchmarks.scenarios.rollout_site import START_S, Cpus

CONNECTIONS = 32
REQUESTS = 16_000
TOKEN_BYTES = 1024
_ISSUER, _AUDIENCE, _CALLER = "https://issuer.example", "aiorch", "alice"
_QUOTA = {"tenant": "*", "requests_per_s": 1e7, "rows_per_s": 1e7, "max_in_flight": 1_000_000}
#: What a run is called: who asks, and how what is shown is sent.
INDEXED, WHOLE, H2LOAD, TLS = "indexed", "whole", "h2load", "tls, indexed"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What callers show, and the settings by which a server knows it."""

    token: str
    key: str
    settings: Mapping[str, Any]


def make_credentials(folder: Path) -> Credentials:
    """A token of about TOKEN_BYTES signed by a new key, whose set is in a file of ``folder``, and an API key."""
    private, kid = ec.generate_private_key(ec.SECP256R1()), "bench"
    public = ECAlgorithm.to_jwk(private.public_key(), as_dict=True) | {"kid": kid, "use": "sig", "alg": "ES256"}
    (folder / "keys.json").write_text(json.dumps({"keys": [public]}), encoding="utf-8")
    now = int(time.time())
    claims: dict[str, Any] = {"iss": _ISSUER, "aud": _AUDIENCE, "sub": _CALLER, "tenant": "bench", "iat": now}
    claims |= {"exp": now + 3600, "groups": ["all"]}

    def sign() -> str:
        return jwt.encode(claims, private, algorithm="ES256", headers={"kid": kid})

    claims["note"] = secrets.token_urlsafe(1000)[: (TOKEN_BYTES - len(sign())) * 3 // 4 - 15]
    key = make_key()
    settings = {
        "enabled": True,
        "certificates": {"enabled": False},
        "tokens": [{"issuer": _ISSUER, "audience": [_AUDIENCE], "jwks_file": str(folder / "keys.json")}],
        "api_keys": [{"id": key.id, "sha256": key.sha256.hex(), "principal": "bob", "tenant": "bench"}],
        "bindings": [{"principal": name, "role": "client"} for name in (_CALLER, "bob")],
        "quotas": [_QUOTA],
    }
    return Credentials(sign(), key.text, settings)


class AccessSite:
    """Servers of the same model that differ in what they ask; from ``with`` to the end of the stack."""

    def __init__(self, folder: Path, cpus: Cpus, stack: ExitStack) -> None:
        self.workload: Workload = make_identity()
        self._folder, self._cpus, self._stack = folder, cpus, stack

    def start(
        self,
        name: str,
        security: Mapping[str, Any],
        token: str = "",
        certificate: Certificate | None = None,
        is_mutual: bool = False,
    ) -> tuple[RunningServer, int]:
        """A server that answers, and how many bytes its answer has."""
        own = self._folder / name
        own.mkdir()
        plan = plan_aiorch(Situation(self.workload, find_free_port(), own, own, certificate))
        settings: dict[str, Any] = {"security": security} if security else {}
        if certificate is not None and is_mutual:
            settings["grpc"] = {"tls": {"root": str(certificate.certificate), "require_client_auth": True}}
        (own / "server.yaml").write_text(json.dumps(settings), encoding="utf-8")
        command = [*plan.command, "--config", str(own / "server.yaml")]
        process = self._stack.enter_context(
            ServerProcess(name, command, self._cpus.server, own / "log", plan.environment)
        )
        server = RunningServer(process, int(command[command.index("--grpc-port") + 1]), plan.wire)
        process.await_port(server.port, START_S)
        return server, _ask(server, self.workload, token, certificate)

    def make_echoes(
        self, server: RunningServer, token: str = "", how: Compression = Compression.INDEXED, tls: Any = None
    ) -> Echoes:
        """32 connections that ask one request after the other."""
        payload = server.wire.payload(self.workload)
        load = Echoes(server.port, payload, CONNECTIONS, token=token, compression=how, tls=tls)
        self._stack.callback(load.close)
        return load

    def make_h2load(self, server: RunningServer, size: int, token: str = "") -> Callable[[], None]:
        """The same by h2load, with connections of its own each time."""
        load = make_load(server, self.workload, self._folder / "payload", self._cpus.load)
        headers = [*load.headers, *([f"authorization: {token}"] if token else [])]
        load = type(load)(load.url, load.payload, headers, load.cpu)
        return lambda: _discard(load.run(CONNECTIONS, 1, REQUESTS, size))


def _discard(_: object) -> None:
    pass


def _ask(server: RunningServer, workload: Workload, token: str, certificate: Certificate | None) -> int:
    """Until the model answers rightly; the bytes of DATA of the answer."""
    target = f"127.0.0.1:{server.port}"
    if certificate is None:
        channel = grpc.insecure_channel(target)
    else:
        files = certificate.certificate.read_bytes(), certificate.key.read_bytes(), certificate.certificate.read_bytes()
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(*files))
    metadata = (("authorization", token),) if token else ()
    with channel:
        until = time.monotonic() + START_S
        while True:
            try:
                response: bytes = channel.unary_unary(MODEL_INFER)(
                    workload.request([0]), metadata=metadata, timeout=START_S, wait_for_ready=True
                )
                break
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > until:
                    raise LoadFailed(f"{server.process.name}: {error.code().name}: {error.details()}") from None
                time.sleep(0.02)
    workload.compare(response, [0], "bench")
    return 5 + len(response)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of caller: what it shows to a server that asks or not, how, and the kind that it is compared with."""

    shows: str
    sent: str
    is_asked: bool
    server: RunningServer
    run: Callable[[], None]

    @property
    def key(self) -> tuple[str, str, bool]:
        return self.shows, self.sent, self.is_asked


def make_kinds(folder: Path, cpus: Cpus, stack: ExitStack) -> list[Kind]:
    """All callers, connected to servers that run."""
    site, shown = AccessSite(folder, cpus, stack), make_credentials(folder)
    token, key = f"Bearer {shown.token}", f"Bearer {shown.key}"
    certificate = make_certificate(folder)
    own_security = {"enabled": True, "bindings": [{"principal": "localhost", "role": "client"}], "quotas": [_QUOTA]}
    off, size = site.start("open", {})
    on, _ = site.start("asked", shown.settings, token)
    tls_off, _ = site.start("tls", {}, certificate=certificate)
    tls_on, _ = site.start("mutual", own_security, certificate=certificate, is_mutual=True)
    context = ssl.create_default_context(cafile=str(certificate.certificate))
    context.load_cert_chain(certificate.certificate, certificate.key)
    context.set_alpn_protocols(["h2"])

    def echo(load: Echoes) -> Callable[[], None]:
        return lambda: load.run(REQUESTS, size)

    return [
        Kind("nothing", INDEXED, False, off, echo(site.make_echoes(off))),
        Kind("token", INDEXED, True, on, echo(site.make_echoes(on, token))),
        Kind("API key", INDEXED, True, on, echo(site.make_echoes(on, key))),
        Kind("token", WHOLE, False, off, echo(site.make_echoes(off, token, Compression.PLAIN))),
        Kind("token", WHOLE, True, on, echo(site.make_echoes(on, token, Compression.PLAIN))),
        Kind("nothing", H2LOAD, False, off, site.make_h2load(off, size)),
        Kind("token", H2LOAD, False, off, site.make_h2load(off, size, token)),
        Kind("token", H2LOAD, True, on, site.make_h2load(on, size, token)),
        Kind("API key", H2LOAD, False, off, site.make_h2load(off, size, key)),
        Kind("API key", H2LOAD, True, on, site.make_h2load(on, size, key)),
        Kind("certificate", TLS, False, tls_off, echo(site.make_echoes(tls_off, tls=context))),
        Kind("certificate", TLS, True, tls_on, echo(site.make_echoes(tls_on, tls=context))),
    ]


def read_cpu_ns(pid: int) -> int:
    """What all threads of the process have run, more finely than in clock ticks."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def measure_access(folder: Path, cpus: Cpus, turns: int, out: Console) -> dict[str, Any]:
    """CPU microseconds per request of each kind in each turn; LoadFailed when any request was not answered rightly."""
    spent: dict[tuple[str, str, bool], list[float]] = {}
    with ExitStack() as stack:
        kinds = make_kinds(folder, cpus, stack)
        for kind in kinds:
            kind.run()
        for turn in range(turns):
            for kind in kinds if turn % 2 == 0 else kinds[::-1]:
                before = read_cpu_ns(kind.server.process.pid)
                kind.run()
                cpu_us = (read_cpu_ns(kind.server.process.pid) - before) / REQUESTS / 1000
                spent.setdefault(kind.key, []).append(cpu_us)
            out.print(f"access: turn {turn + 1} of {turns}")
    result = {"connections": CONNECTIONS, "requests": REQUESTS, "turns": turns, "token_bytes": TOKEN_BYTES}
    rows = [
        {"shows": shows, "sent": sent, "is_asked": is_asked, "cpu_us": median(found), "turns_us": found}
        for (shows, sent, is_asked), found in spent.items()
    ]
    for row in rows:
        out.print(f"{row['shows']}, {row['sent']}, {'on' if row['is_asked'] else 'off'}: {row['cpu_us']:.2f} us")
    return result | {"rows": rows}
