"""Answers kept in a real Redis: shared, bounded, and never in a request's way when Redis is gone, stuck or wrong."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from redis_server import RedisServer
from running_site import Site
from served import serve

from aiorch_server.cache import GuardedCache, open_cache
from aiorch_server.config.server import CacheConfig

SECRET = "a secret, with=all sorts"
TENSORS = """
    input { name: "INPUT0" data_type: TYPE_FP32 dims: [1] }
    output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [1] }"""
CONFIG = f'backend: "python" max_batch_size: 0 {TENSORS} response_cache {{ enable: true }}'
#: Answers its input, how often it has run since it was loaded, and what is written here.
MODEL = """
class Model:
    inputs, outputs, max_batch_size = [("INPUT0", "FP32", [1])], [("OUTPUT0", "FP32", [1])], 0
    runs = -1  # it is run once before it serves
    def execute(self, inputs):
        self.runs += 1
        return {"OUTPUT0": inputs["INPUT0"] * 1000 + self.runs + 100}
"""
WAIT_S = 30.0


def write_model(root: Path, text: str = MODEL, name: str = "counter") -> Path:
    (root / name / "1").mkdir(parents=True, exist_ok=True)
    (root / name / "config.pbtxt").write_text(CONFIG)
    (root / name / "1" / "model.py").write_text(text)
    return root


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def open_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    opened: list[Site] = []

    def make(repository: Path, **settings: Any) -> Site:
        opened.append(
            Site(
                repository,
                io_threads=1,
                cache={"kind": "redis", "timeout_ms": settings.pop("timeout_ms", 2000), "redis": settings},
                execution={"backends": ["aiorch_backends.python:PythonBackend"]},
                lifecycle={"control_mode": "explicit", "load_models": ["*"]},
                metrics={"port": 0},
            )
        )
        return opened[-1]

    yield make
    for site in opened:
        site.close()


def infer(site: Site, value: float) -> float:
    with grpc_client.InferenceServerClient(site.target) as client:
        tensor = grpc_client.InferInput("INPUT0", [1], "FP32")
        tensor.set_data_from_numpy(np.array([value], np.float32))
        return float(client.infer("counter", [tensor]).as_numpy("OUTPUT0")[0])


def read_metrics(site: Site) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{site.application.metrics_port}/metrics") as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE)}


def count_failures(site: Site) -> float:
    return read_metrics(site)["aiorch_cache_failures_total"]


def wait_until(condition: Callable[[], Any]) -> Any:
    until = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < until, "did not come"
        time.sleep(0.01)
    return found


def list_keys(server: RedisServer, password: str | None = None) -> list[bytes]:
    return sorted(server.call(lambda client: client.keys("*"), password))


def test_servers_share_answers_that_stay_when_they_go(
    redis_server: RedisServer, open_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = open_site(write_model(tmp_path / "models"), host="127.0.0.1", port=redis_server.port, db=3)
    assert [infer(site, 1), infer(site, 1), infer(site, 2)] == [1101, 1101, 2102]
    wait_until(lambda: redis_server.call(lambda client: client.info("keyspace")).get("db3", {}).get("keys") == 2)
    # the same model, copied elsewhere; over a unix socket
    shutil.copytree(tmp_path / "models", tmp_path / "copy")
    other = open_site(tmp_path / "copy", host=f"unix:{redis_server.path}", db=3)
    assert [infer(other, 2), infer(other, 1), infer(other, 3)] == [2102, 1101, 3101]
    metrics = read_metrics(other)
    assert metrics['nv_cache_num_hits_per_model{model="counter",version="1"}'] == 2
    assert metrics["aiorch_cache_failures_total"] == 0
    assert "aiorch_cache_entries" not in metrics


def test_entries_are_named_and_live_for_a_time(
    redis_server: RedisServer, open_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = open_site(write_model(tmp_path / "models"), host=f"unix:{redis_server.path}", key_prefix="ours")
    infer(site, 1)
    (key,) = wait_until(lambda: list_keys(redis_server))
    assert re.fullmatch(rb"ours:counter:1:[0-9a-f]{64}", key)
    assert 0 < redis_server.call(lambda client: client.ttl(key)) <= 24 * 3600


def test_another_model_never_answers_with_what_is_there(
    redis_server: RedisServer, open_site: Callable[..., Site], tmp_path: Path
) -> None:
    """Not even one whose files look the same from outside: name, size, time and inode."""
    root, path = write_model(tmp_path / "models"), tmp_path / "models" / "counter" / "1" / "model.py"
    site = open_site(root, host=f"unix:{redis_server.path}")
    assert infer(site, 1) == 1101
    wait_until(lambda: list_keys(redis_server))
    before = path.stat()
    path.write_text(MODEL.replace("+ 100", "+ 200"))
    with grpc_client.InferenceServerClient(site.target) as client:
        client.load_model("counter")
        assert infer(site, 1) == 1201
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = path.stat()
        assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
        other = open_site(root, host=f"unix:{redis_server.path}")
        assert infer(other, 1) == 1201
        # what a load request brings, twice with the same number of overrides
        for text in ("+ 300", "+ 400"):
            files = {"file:1/model.py": MODEL.replace("+ 100", text).encode()}
            config = '{"backend": "python", "max_batch_size": 0, "response_cache": {"enable": true}}'
            third = Site(
                root,
                io_threads=1,
                cache={"kind": "redis", "redis": {"host": f"unix:{redis_server.path}"}},
                execution={"backends": ["aiorch_backends.python:PythonBackend"], "allow_code": True},
                lifecycle={"control_mode": "explicit"},
            )
            try:
                with grpc_client.InferenceServerClient(third.target) as loader:
                    loader.load_model("counter", config=config, files=files)
                assert infer(third, 1) == 1001 + int(text[2:])
            finally:
                third.close()


def test_without_redis_requests_are_served_and_with_it_again_cached(
    redis_server: RedisServer, open_site: Callable[..., Site], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiorch_server.cache")
    site = open_site(write_model(tmp_path / "models"), host="127.0.0.1", port=redis_server.port)
    assert [infer(site, 1), infer(site, 1)] == [1101, 1101]
    redis_server.kill()
    assert [infer(site, 2), infer(site, 2), infer(site, 2)] == [2102, 2103, 2104]
    assert count_failures(site) >= 1
    wait_until(lambda: infer(site, 3) and count_failures(site) >= 2)  # it was looked for again
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    redis_server.start()
    wait_until(lambda: infer(site, 4) == infer(site, 4))
    assert "is used again" in caplog.text


def test_redis_that_hangs_delays_few_and_little(
    redis_server: RedisServer, open_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = open_site(write_model(tmp_path / "models"), host="127.0.0.1", port=redis_server.port, timeout_ms=300)
    infer(site, 1)
    wait_until(lambda: list_keys(redis_server))
    redis_server.send(signal.SIGSTOP)
    try:
        start = time.monotonic()
        assert infer(site, 1) == 1102
        assert time.monotonic() - start >= 0.3
        assert count_failures(site) == 1
        start = time.monotonic()
        for value in range(10, 30):
            infer(site, value)
        # one look-up might take the limit again, twenty would be 6 s
        assert time.monotonic() - start < 3.0
    finally:
        redis_server.send(signal.SIGCONT)
    wait_until(lambda: infer(site, 3) == infer(site, 3))
    # nobody is given what another's command, cut off above, was answered
    assert {round(infer(site, value) / 1000) for value in (1, 2, 3)} == {1, 2, 3}


def test_rubbish_is_no_answer(redis_server: RedisServer, open_site: Callable[..., Site], tmp_path: Path) -> None:
    site = open_site(write_model(tmp_path / "models"), host=f"unix:{redis_server.path}")
    infer(site, 1)
    (key,) = wait_until(lambda: list_keys(redis_server))
    infer(site, 2)
    other = wait_until(lambda: [each for each in list_keys(redis_server) if each != key])[0]
    good, others = (redis_server.call(lambda client, each=each: client.get(each)) for each in (key, other))
    wrong = [b"x", b"\0" * 200, good[:-1], good[:30], good + b"x", good[:-1] + b"\xff", others, b"\xff" * (5 << 20)]
    for number, value in enumerate(wrong, 1):
        redis_server.call(lambda client, value=value: client.set(key, value))
        assert infer(site, 1) == 1102 + number
        assert count_failures(site) == number
        wait_until(lambda value=value: redis_server.call(lambda client: client.get(key)) != value)
        assert infer(site, 1) == 1102 + number  # it was put there again
    redis_server.call(lambda client: (client.delete(key), client.rpush(key, "a", "list")))
    assert infer(site, 1) == 1103 + len(wrong)
    assert count_failures(site) == len(wrong) + 1
    wait_until(lambda: infer(site, 1) == 1103 + len(wrong))


@pytest.mark.parametrize(
    "babble", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$99999999999\r\nabc", b"*1\r\n" * 5000, b"\0" * 4096, b""]
)
def test_what_is_no_redis_at_all(babble: bytes, open_site: Callable[..., Site], tmp_path: Path) -> None:
    def serve_rubbish() -> None:
        while True:
            try:
                connection, _ = door.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(1000)
                    connection.sendall(babble)
                except OSError:
                    continue

    with socket.create_server(("127.0.0.1", 0)) as door:
        thread = threading.Thread(target=serve_rubbish, daemon=True)
        thread.start()
        site = open_site(write_model(tmp_path / "models"), host="127.0.0.1", port=door.getsockname()[1])
        assert [infer(site, 1), infer(site, 1)] == [1101, 1102]
        assert count_failures(site) >= 1
        door.shutdown(socket.SHUT_RDWR)
        thread.join(WAIT_S)


def test_the_password_is_used_and_never_told(
    tmp_path: Path, open_site: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = RedisServer(tmp_path, "--requirepass", SECRET)
    try:
        root = write_model(tmp_path / "models")
        site = open_site(root, host="127.0.0.1", port=server.port, password=SECRET)
        assert [infer(site, 1), infer(site, 1)] == [1101, 1101]
        assert count_failures(site) == 0
        wrong = open_site(root, host="127.0.0.1", port=server.port, user="nobody", password=f"no {SECRET}")
        assert [infer(wrong, 5), infer(wrong, 5)] == [5101, 5102]
        assert count_failures(wrong) >= 1
        assert "look-up failed (AuthenticationError" in caplog.text
        assert SECRET not in caplog.text
        assert SECRET not in repr(site.config) and SECRET not in site.config.model_dump_json()
    finally:
        server.kill()


def test_tls(tmp_path: Path, open_site: Callable[..., Site]) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

    name = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    openssl(
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days", "2", *name
    )
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    files = [f"--tls-{kind}-file={tmp_path / file}" for kind, file in (("cert", "cert.pem"), ("key", "key.pem"))]
    options = [part for each in files for part in each.split("=")]
    server = RedisServer(
        tmp_path, "--port", "0", "--tls-port", str(port), *options, "--tls-ca-cert-file", str(tmp_path / "cert.pem"),
        "--tls-auth-clients", "no",
    )  # fmt: skip
    try:
        root = write_model(tmp_path / "models")
        site = open_site(root, host="127.0.0.1", port=port, use_tls=True, tls_root=str(tmp_path / "cert.pem"))
        assert [infer(site, 1), infer(site, 1)] == [1101, 1101]
        wait_until(lambda: list_keys(server))
        assert count_failures(site) == 0
        unknown = open_site(root, host="127.0.0.1", port=port, use_tls=True)
        assert infer(unknown, 1) == 1101
        assert count_failures(unknown) >= 1
    finally:
        server.kill()


def test_triton_s_options(redis_server: RedisServer, tmp_path: Path) -> None:
    options = ["--cache-config", f"redis,host=127.0.0.1,port={redis_server.port}", "--cache-config", "redis,db=2"]
    more = [
        "--cache-config",
        "redis,socket_timeout=500",
        "--cache-config",
        "redis,pool_size=2",
        "--cache-ttl-secs",
        "60",
    ]
    with serve(write_model(tmp_path / "models"), *options, *more) as served:
        tensor = grpc_client.InferInput("INPUT0", [1], "FP32")
        tensor.set_data_from_numpy(np.array([1], np.float32))
        with grpc_client.InferenceServerClient(served.grpc) as client:
            found = [float(client.infer("counter", [tensor]).as_numpy("OUTPUT0")[0]) for _ in range(2)]
        assert found == [1101, 1101]
        wait_until(lambda: redis_server.call(lambda client: client.info("keyspace")).get("db2"))
        assert served.end() == 0


async def open_guarded(server: RedisServer, **settings: Any) -> GuardedCache:
    redis = {"host": f"unix:{server.path}", **settings}
    cache = open_cache(CacheConfig.model_validate({"kind": "redis", "timeout_ms": 2000, "redis": redis}))
    assert isinstance(cache, GuardedCache)
    return cache


async def test_large_answers_are_not_kept(redis_server: RedisServer) -> None:
    cache = await open_guarded(redis_server, max_entry_bytes=2048)
    await cache.put(b"small", b"s" * 1000)
    await cache.put(b"large", b"l" * 3000)
    await cache.close()
    assert list_keys(redis_server) == [b"aiorch:small"]
    assert cache.read_use().failures == 0


async def test_large_answers_come_back(redis_server: RedisServer) -> None:
    cache = await open_guarded(redis_server, max_entry_bytes=8 << 20)
    value = os.urandom(1 << 20) * 4
    await cache.put(b"key", value)
    assert await cache.get(b"key") == value  # before it is there
    while cache._pending:
        await asyncio.sleep(0.001)
    assert await cache.get(b"key") == value
    await cache.close()


async def test_callers_who_give_up_in_the_middle_leave_no_answer_to_others(redis_server: RedisServer) -> None:
    """A connection whose command was cut off must not give its answer to the next."""
    cache = await open_guarded(redis_server, pool_size=2)
    keys = [f"k{number}".encode() for number in range(20)]
    for key in keys:
        await cache.put(key, key * 1000)
    while cache._pending:
        await asyncio.sleep(0.001)
    for round_number in range(30):
        tasks = [asyncio.create_task(cache.get(key)) for key in keys]
        for _ in range(round_number):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for key, value in zip(keys, found, strict=True):
            assert value == key * 1000 or isinstance(value, asyncio.CancelledError)
    assert cache.read_use().failures == 0
    await cache.close()
