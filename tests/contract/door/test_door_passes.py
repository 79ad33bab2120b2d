"""Passes and quotas at the compiled door: what goes through without Python, what never does, and what is counted."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from hand_driven import HandDriven, make_spec, message, values_of

from aiorch_server._core import Passes, Quota, Router, Scheduler, encode_request
from aiorch_server.errors import QuotaExceeded
from aiorch_server.frontends.grpc import FAST_PATH, ServerCredentials

from .conftest import TIMEOUT_S, Door, wait_until

KINDS = ["native-asyncio-0", "native-asyncio-1", "native-uvloop-2"]
TOKEN = "Bearer " + "eyJhbGciOiJSUzI1NiJ9." * 48
DECLINED = b"python"
HOUR_NS = 3600 * 10**9
MakeDoor = Callable[..., Door]


class PassDoor:
    """A native door that asks for passes, with one model under two names; what is declined is noted."""

    def __init__(
        self, make_door: MakeDoor, kind: str, passes: Passes | None = None, *, credentials: Any = None, **options: Any
    ) -> None:
        self.scheduler = Scheduler(make_spec(), **options)
        self.instance = HandDriven(self.scheduler)
        self.passes = passes or Passes()
        self.declined: list[dict[str, Any]] = []
        router = Router()
        router.publish({"echo": (3, {3: self.scheduler}), "other": (3, {3: self.scheduler})})

        async def model_infer(request: bytes, context: Any) -> bytes:
            self.declined.append(dict(context.invocation_metadata()))
            return DECLINED

        def register(server: Any) -> None:
            service, method = FAST_PATH[1:].split("/")
            handler = grpc.unary_unary_rpc_method_handler(model_infer)
            server.add_registered_method_handlers(service, {method: handler})

        secure = {"credentials": credentials} if credentials is not None else {}
        self.door = make_door(kind, router=router, register=register, passes=self.passes, **secure)
        self.channel = None if credentials is not None else self.door.channel(max_receive_message_length=-1)

    def add(self, credential: str | bytes = TOKEN, model: str = "echo", **options: Any) -> None:
        options.setdefault("expires_ns", time.monotonic_ns() + HOUR_NS)
        credential = credential if isinstance(credential, bytes) else credential.encode()
        assert self.passes.add(credential, model, generation=self.passes.generation, **options)

    def begin(self, value: float = 1, *tokens: str, channel: grpc.Channel | None = None, **options: Any) -> Any:
        options.setdefault("timeout", TIMEOUT_S)
        metadata = [("authorization", token) for token in tokens or (TOKEN,)]
        infer = (channel or self.channel).unary_unary(FAST_PATH)  # type: ignore[union-attr]
        return infer.future(message(value, id=str(value)), metadata=metadata, **options)

    def passed(self, *tokens: str, channel: grpc.Channel | None = None) -> bool:
        answer = self.begin(4, *tokens, channel=channel).result()
        assert answer == DECLINED or values_of(answer) == [8.0]
        return bool(answer != DECLINED)

    def stop(self) -> None:
        self.instance.stop()
        wait_until(lambda: self.door.server.in_flight == 0)


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest, make_door: MakeDoor) -> Iterator[PassDoor]:
    running = PassDoor(make_door, request.param)
    running.instance.go(1_000_000)
    yield running
    running.stop()


@pytest.fixture(params=KINDS)
def steered(request: pytest.FixtureRequest, make_door: MakeDoor) -> Iterator[PassDoor]:
    """Its instance runs when the test says so."""
    running = PassDoor(make_door, request.param)
    yield running
    running.stop()


def refusal_of(call: Any) -> tuple[grpc.StatusCode, str, str]:
    """Code, text, and how many milliseconds to wait."""
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    trailers = dict(caught.value.trailing_metadata() or ())
    return caught.value.code(), str(caught.value.details()), str(trailers.get("grpc-retry-pushback-ms", ""))


# --------------------------------------------------------------------------------------------------- what does not pass
def test_nobody_passes_without_a_pass(site: PassDoor) -> None:
    assert not site.passed()
    assert site.channel is not None
    assert site.channel.unary_unary(FAST_PATH)(message(1), timeout=TIMEOUT_S) == DECLINED
    assert not site.passed("")
    assert len(site.declined) == 3
    assert site.declined[0]["authorization"] == TOKEN, "Python sees what was shown"
    assert site.scheduler.counters().success.count == 0


def test_only_the_right_credential_and_model_pass(site: PassDoor) -> None:
    site.add()
    assert site.passed()
    for wrong in ("x", TOKEN[:-1], TOKEN + "x", "x" + TOKEN[1:], TOKEN[:-1] + "x", TOKEN.lower()):
        assert not site.passed(wrong)
        assert site.passed(), "the connection remembers who it was"
    assert not site.passed(TOKEN, TOKEN), "several headers are nobody's"
    assert site.channel is not None
    infer = site.channel.unary_unary(FAST_PATH)
    other = encode_request("other", "", "", [("X", "FP32", (1, 4), bytes(16))])
    metadata = [("authorization", TOKEN)]
    assert infer(other, metadata=metadata, timeout=TIMEOUT_S) == DECLINED
    site.add(model="other")
    for _ in range(3):  # the memory of a connection is of one model at a time
        assert infer(other, metadata=metadata, timeout=TIMEOUT_S) != DECLINED
        assert site.passed()
    assert infer(other, timeout=TIMEOUT_S) == DECLINED, "the same connection without the header"


def test_a_pass_expires(site: PassDoor) -> None:
    site.add(expires_ns=time.monotonic_ns() + 300_000_000)
    began = time.monotonic()
    assert site.passed() or time.monotonic() - began > 0.3
    wait_until(lambda: not site.passed())
    assert time.monotonic() - began >= 0.3
    assert not site.passed()
    site.add()
    assert site.passed()


def test_clear_holds_at_once(site: PassDoor) -> None:
    channels = [site.door.channel() for _ in range(4)]
    for _ in range(10):
        generation = site.passes.generation
        site.add()
        assert all(site.passed(channel=channel) for channel in channels)
        site.passes.clear()
        assert not any(site.passed(channel=channel) for channel in channels)
        assert not site.passes.add(
            TOKEN.encode(), "echo", expires_ns=time.monotonic_ns() + HOUR_NS, generation=generation
        ), "decided before"
        assert not site.passed()


def test_what_is_thrown_out_does_not_pass(make_door: MakeDoor) -> None:
    site = PassDoor(make_door, "native-asyncio-1", Passes(max_entries=1))
    site.instance.go(1000)
    site.add("one")
    assert site.passed("one")
    site.add("two")
    assert not site.passed("one") and site.passed("two")
    site.stop()


def test_a_replaced_pass_counts_for_its_new_quota(site: PassDoor) -> None:
    former, latter = Quota("a"), Quota("b")
    site.add(quota=former)
    assert site.passed()
    site.add(quota=latter)
    assert site.passed()
    assert (former.counters().admitted, latter.counters().admitted) == (1, 1)


# -------------------------------------------------------------------------------------------------------- what passes
def test_a_hit_never_reaches_python(site: PassDoor) -> None:
    site.add()
    site.add("other")
    calls = [site.begin(value, TOKEN if value % 3 else "other") for value in range(300)]
    assert [values_of(call.result()) for call in calls] == [[2.0 * value] for value in range(300)]
    assert site.declined == []
    assert site.scheduler.counters().success.count == 300


def test_large_tensors_of_known_and_unknown_callers(site: PassDoor) -> None:
    """Who was let through before may have its tensor received into a batch; the others' end in Python, whole."""
    rows = np.random.default_rng(1).random((2, 200_000), np.float32)
    request = encode_request("echo", "", "big", [("X", "FP32", rows.shape, rows.tobytes())])
    site.add()
    assert site.channel is not None
    infer = site.channel.unary_unary(FAST_PATH)
    for _ in range(3):
        for token in ("nobody", TOKEN):
            answer = infer(request, metadata=[("authorization", token)], timeout=TIMEOUT_S)
            assert (answer == DECLINED) == (token == "nobody")
    assert len(site.declined) == 3


# --------------------------------------------------------------------------------------------------------------- mTLS
@pytest.mark.parametrize("kind", KINDS)
def test_a_certificate_is_a_credential(make_door: MakeDoor, kind: str, certificates: Callable[[str], bytes]) -> None:
    mutual = ServerCredentials(
        certificates("server.key"), certificates("server.crt"), certificates("ca.crt"), require_client_auth=True
    )
    site = PassDoor(make_door, kind, credentials=mutual)
    site.instance.go(1000)
    shown = grpc.ssl_channel_credentials(certificates("ca.crt"), certificates("client.key"), certificates("client.crt"))
    channel = site.door.channel(shown)
    infer = channel.unary_unary(FAST_PATH)
    der = to_der(certificates("client.crt"))
    try:
        assert infer(message(1), timeout=TIMEOUT_S) == DECLINED
        site.add(der)  # as a header: it must not serve as a certificate
        assert infer(message(1), timeout=TIMEOUT_S) == DECLINED
        site.add(der, is_certificate=True)
        assert values_of(infer(message(1), timeout=TIMEOUT_S)) == [2.0]
        assert not site.passed(channel=channel), "a header says who calls, whatever the certificate"
        site.add()
        assert site.passed(channel=channel)
        assert values_of(infer(message(1), timeout=TIMEOUT_S)) == [2.0]
        assert not site.passed(TOKEN, TOKEN, channel=channel), "several headers are nobody's, whatever the certificate"
        site.passes.clear()
        assert infer(message(1), timeout=TIMEOUT_S) == DECLINED
        assert len(site.declined) == 5
    finally:
        channel.close()
        site.stop()


def to_der(pem: bytes) -> bytes:
    command = ["openssl", "x509", "-outform", "DER"]
    return subprocess.run(command, input=pem, check=True, capture_output=True).stdout


# -------------------------------------------------------------------------------------------------------------- quotas
def test_a_rate_is_refused_with_its_time(site: PassDoor) -> None:
    quota = Quota("acme", requests_per_s=0.001)
    site.add(quota=quota)
    assert site.passed()
    for _ in range(20):
        code, text, pushback = refusal_of(site.begin(7))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        head, _, tail = text.partition("; try again in ")
        assert head == "[request id: 7] quota of tenant 'acme' exceeded: 0.001 requests/s"
        assert tail == f"{int(pushback) // 1000}.{int(pushback) % 1000:03} s" and 990_000 < int(pushback) <= 1_000_000
    counters = quota.counters()
    assert (counters.admitted, counters.refused_requests, counters.in_flight) == (1, 20, 0)
    assert sum(site.scheduler.counters().failures.values()) == 0, "no failure of the model's"
    quota.set(requests_per_s=0)
    assert site.passed(), "changed at run time"


def test_rows_count(site: PassDoor) -> None:
    quota = Quota("acme", rows_per_s=8)
    site.add(quota=quota)
    infer = site.door.channel().unary_unary(FAST_PATH)
    metadata = [("authorization", TOKEN)]
    assert values_of(infer(message(1, 2, 3), metadata=metadata, timeout=TIMEOUT_S)) == [2.0, 4.0, 6.0]
    code, text, _ = refusal_of(infer.future(message(*range(8)), metadata=metadata, timeout=TIMEOUT_S))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "exceeded: 8 rows/s" in text
    assert quota.counters().refused_rows == 1


def test_refusals_of_a_burst_are_exact(site: PassDoor) -> None:
    """What clients were told is what was counted, and no more was let in than the bucket held and time brought."""
    quota = Quota("acme", requests_per_s=50)
    site.add(quota=quota)
    began = time.monotonic()
    channels = [site.door.channel() for _ in range(4)]
    calls = [site.begin(index, channel=channels[index % 4]) for index in range(400)]
    codes = [call.code() for call in calls]
    passed_s = time.monotonic() - began
    refused = codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert refused + codes.count(grpc.StatusCode.OK) == 400
    counters = quota.counters()
    assert (counters.admitted, counters.refused_requests, counters.in_flight) == (400 - refused, refused, 0)
    assert 50 <= counters.admitted <= 50 + 50 * passed_s


def test_in_flight_is_bounded_over_both_planes(steered: PassDoor) -> None:
    quota = Quota("acme", max_in_flight=4)
    steered.add(quota=quota)
    with quota.admit(1, time.monotonic_ns()):
        running = [steered.begin(value) for value in range(3)]
        wait_until(lambda: quota.counters().in_flight == 4)
        for _ in range(5):
            assert refusal_of(steered.begin(5)) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "[request id: 5] quota of tenant 'acme' exceeded: 4 requests in flight; try again when one of them is "
                "answered",
                "1000",
            )
        with pytest.raises(QuotaExceeded):
            quota.admit(1, time.monotonic_ns())
    more = steered.begin(3)
    wait_until(lambda: quota.counters().in_flight == 4)
    steered.instance.go(50)
    assert [values_of(call.result()) for call in (*running, more)] == [[0.0], [2.0], [4.0], [6.0]]
    assert quota.counters().in_flight == 0, "counted down before the answer leaves"
    assert quota.counters().refused_in_flight == 6


def test_a_full_queue_gives_the_tokens_back(make_door: MakeDoor) -> None:
    site = PassDoor(make_door, "native-asyncio-1", max_queue_size=1)
    quota = Quota("acme", requests_per_s=0.001, rows_per_s=0.001)
    site.add(quota=quota)
    site.add("others")
    others = [site.begin(1, "others")]
    wait_until(lambda: len(site.instance.sizes) == 1)
    others.append(site.begin(2, "others"))
    wait_until(lambda: site.scheduler.pending == 1)
    for _ in range(3):
        code, text, _ = refusal_of(site.begin(3))
        assert (code, text) == (grpc.StatusCode.UNAVAILABLE, "[request id: 3] Exceeds maximum queue size")
    site.instance.go(50)
    assert [values_of(call.result()) for call in others] == [[2.0], [4.0]]
    assert site.passed()
    assert refusal_of(site.begin(3))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert quota.counters().admitted == 1
    site.stop()


def test_what_is_declined_after_its_pass_takes_nothing(site: PassDoor) -> None:
    """A model that is unloaded at that moment: Python says so, and counts there what it serves."""
    quota = Quota("acme", requests_per_s=0.001)
    site.add(quota=quota)
    site.scheduler.close()
    for _ in range(3):
        assert not site.passed()
    assert quota.counters().admitted == quota.counters().in_flight == quota.counters().refused_requests == 0
    bad = encode_request("echo", "", "", [("X", "INT8", (1, 4), bytes(4))])
    assert site.channel is not None
    infer = site.channel.unary_unary(FAST_PATH)
    assert infer(bad, metadata=[("authorization", TOKEN)], timeout=TIMEOUT_S) == DECLINED
    assert quota.counters().admitted == 0


# --------------------------------------------------------------------------------------------------------------- chaos
CLIENT = """
import grpc, sys
channel = grpc.insecure_channel(sys.argv[1])
metadata = [("authorization", sys.argv[4])]
calls = [channel.unary_unary(sys.argv[2]).future(bytes.fromhex(sys.argv[3]), metadata=metadata) for _ in range(30)]
print("sent", flush=True)
[call.result() for call in calls]
"""


def test_in_flight_comes_back_to_zero_after_a_storm(site: PassDoor) -> None:
    """Cancelled, expired, refused, replaced and cleared at random, from many connections, one of which is killed."""
    quotas = [Quota("small", max_in_flight=5), Quota("fast", requests_per_s=2000), Quota("free")]
    tokens = ["small", "fast", "free"]
    rng = random.Random(7)
    is_over = threading.Event()

    def renew() -> None:
        while not is_over.wait(0.002):
            site.passes.clear()
            for token, quota in zip(tokens, quotas, strict=True):
                site.add(token, quota=quota)

    renewing = threading.Thread(target=renew)
    renewing.start()
    for token, quota in zip(tokens, quotas, strict=True):
        site.add(token, quota=quota)

    def storm(seed: int) -> dict[str, int]:
        own = random.Random(seed)
        channel = site.door.channel()
        seen: dict[str, int] = {}
        for _ in range(12):
            calls = []
            for _ in range(30):
                kind = own.random()
                call = site.begin(
                    own.randrange(100),
                    own.choice(tokens),
                    channel=channel,
                    timeout=own.choice([0.001, 0.005, 0.02]) if kind < 0.3 else TIMEOUT_S,
                )
                if 0.3 < kind < 0.6:
                    call.cancel()
                calls.append(call)
            for call in calls:
                name = call.code().name
                seen[name] = seen.get(name, 0) + 1
        channel.close()
        return seen

    arguments = [site.door.target, FAST_PATH, message(5).hex(), "free"]
    client = subprocess.Popen([sys.executable, "-c", CLIENT, *arguments], stdout=subprocess.PIPE)
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(storm, rng.randrange(1 << 30)) for _ in range(8)]
        assert client.stdout and client.stdout.readline() == b"sent\n"
        client.send_signal(signal.SIGKILL)
        client.communicate(timeout=TIMEOUT_S)
        total: dict[str, int] = {}
        for future in running:
            for name, count in future.result(TIMEOUT_S * 3).items():
                total[name] = total.get(name, 0) + count
    is_over.set()
    renewing.join()
    assert set(total) <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}, total
    assert min(total.get(name, 0) for name in ("OK", "CANCELLED", "DEADLINE_EXCEEDED")) > 0, total
    wait_until(lambda: site.door.server.in_flight == 0)
    for quota in quotas:
        wait_until(lambda quota=quota: quota.counters().in_flight == 0, f"the end of {quota.counters()}")  # type: ignore[misc]
        assert quota.counters().admitted > 0
    assert site.passed("free")


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_stops_lets_go(make_door: MakeDoor, kind: str) -> None:
    site = PassDoor(make_door, kind)
    quota = Quota("acme")
    site.add(quota=quota)
    running, queued = site.begin(1), site.begin(2)
    wait_until(lambda: quota.counters().in_flight == 2 and site.instance.sizes)
    site.door.stop(0.1).result(TIMEOUT_S)
    assert {running.code(), queued.code()} == {grpc.StatusCode.UNAVAILABLE}
    left = sum(site.instance.sizes)
    wait_until(lambda: quota.counters().in_flight == left, "the end of what was queued")
    site.stop()
    wait_until(lambda: quota.counters().in_flight == 0, "the end of what ran")
