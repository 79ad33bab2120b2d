"""Quotas against a model in plain Python; what is taken, given back and left, whoever asks at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiorch_server._core import Admission, Passes, Quota
from aiorch_server.errors import Code, ModelExecutionError, QueueFull, QuotaExceeded, ServerStopping

SECOND_NS = 1_000_000_000
START_NS = 77 * SECOND_NS


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("rate", [-1, float("nan"), float("inf"), 1e-9, 1e9])
@pytest.mark.parametrize("name", ["requests_per_s", "rows_per_s"])
def test_rates_that_are_no_use(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; expected 0 .no bound., or 0.001 to 100000000"):
        Quota("a", **{name: rate})  # type: ignore[arg-type]
    quota = Quota("a", requests_per_s=5, rows_per_s=6, max_in_flight=7)
    with pytest.raises(ValueError, match=name):
        quota.set(**{name: rate})  # type: ignore[arg-type]
    assert (quota.requests_per_s, quota.rows_per_s, quota.max_in_flight) == (5, 6, 7), "half of it was set"


def test_bad_names_and_counts() -> None:
    for tenant in ("", "x" * 129, "é" * 65, "a\0b"):
        with pytest.raises(ValueError, match="a tenant's name has 1 to 128 bytes"):
            Quota(tenant)
    with pytest.raises(ValueError, match="max_in_flight is -1"):
        Quota("a", max_in_flight=-1)
    with pytest.raises(ValueError, match="rows is -1"):
        Quota("a").admit(-1, 0)
    with pytest.raises(TypeError, match=r"Quota\.admit"):
        Admission()


def test_the_longest_name_fits_into_the_text() -> None:
    tenant = "é" * 64
    quota = Quota(tenant, requests_per_s=0.001)
    with quota.admit(1, 1), pytest.raises(QuotaExceeded) as caught:
        quota.admit(1, 1)
    assert str(caught.value) == f"quota of tenant '{tenant}' exceeded: 0.001 requests/s; try again in 1000.000 s"
    assert quota.tenant == tenant


# ----------------------------------------------------------------------------------------------------------- the bounds
def test_requests_per_second() -> None:
    quota = Quota("x", requests_per_s=100)
    for _ in range(100):
        quota.admit(1, START_NS)
    with pytest.raises(QuotaExceeded) as caught:
        quota.admit(1, START_NS + 1)
    assert str(caught.value) == "quota of tenant 'x' exceeded: 100 requests/s; try again in 0.010 s"
    assert caught.value.retry_after_ns == 9_999_999
    assert caught.value.code is Code.RESOURCE_EXHAUSTED and caught.value.retryable
    with pytest.raises(QuotaExceeded):
        quota.admit(1, START_NS + 9_999_999)
    quota.admit(1, START_NS + 10_000_000)
    counters = quota.counters()
    assert (counters.admitted, counters.refused_requests) == (101, 2)


def test_slow_rates_hold_one() -> None:
    quota = Quota("x", requests_per_s=0.5)
    quota.admit(1, START_NS)
    with pytest.raises(QuotaExceeded, match=r"0\.5 requests/s; try again in 2\.000 s"):
        quota.admit(1, START_NS)
    quota.admit(1, START_NS + 2 * SECOND_NS)


def test_a_request_above_the_bucket_needs_a_full_one_and_leaves_it_in_debt() -> None:
    quota = Quota("x", rows_per_s=100)
    quota.admit(1, START_NS)
    with pytest.raises(QuotaExceeded) as caught:
        quota.admit(250, START_NS)
    assert caught.value.retry_after_ns == 10_000_000
    quota.admit(250, START_NS + 10_000_000)
    with pytest.raises(QuotaExceeded, match=r"100 rows/s; try again in 1\.510 s"):
        quota.admit(1, START_NS + 10_000_000)
    quota.admit(1, START_NS + 10_000_000 + 1_510_000_000)
    quota.admit(2**62, START_NS + 10 * SECOND_NS)
    with pytest.raises(QuotaExceeded) as caught:
        quota.admit(0, START_NS + 10 * SECOND_NS)
    assert caught.value.retry_after_ns == 3599 * SECOND_NS, "at most an hour of debt"


def test_the_bound_that_lasts_longer_is_named() -> None:
    quota = Quota("x", requests_per_s=1, rows_per_s=10)
    quota.admit(15, START_NS)
    with pytest.raises(QuotaExceeded, match="10 rows/s"):
        quota.admit(10, START_NS)
    with pytest.raises(QuotaExceeded, match="1 requests/s"):
        quota.admit(1, START_NS)
    assert quota.counters().refused_rows == quota.counters().refused_requests == 1


def test_in_flight() -> None:
    quota = Quota("x", max_in_flight=2)
    with quota.admit(1, 0) as first:
        second = quota.admit(1, 0)
        with pytest.raises(QuotaExceeded) as caught:
            quota.admit(1, 0)
        assert str(caught.value) == (
            "quota of tenant 'x' exceeded: 2 requests in flight; try again when one of them is answered"
        )
        assert caught.value.retry_after_ns == SECOND_NS, "nobody knows when that is: a usual pause"
        second.release()
        second.release()
        assert quota.counters().in_flight == 1, "an end counts once"
        first.release()
    assert quota.counters().in_flight == 0
    quota.admit(1, 0)  # let go of at once
    assert quota.counters().in_flight == 0
    assert quota.counters().refused_in_flight == 1


def test_bounds_that_change() -> None:
    quota = Quota("x")
    held = [quota.admit(1000, START_NS) for _ in range(50)]
    quota.set(requests_per_s=2, max_in_flight=50)
    with pytest.raises(QuotaExceeded, match="50 requests in flight"):
        quota.admit(1, START_NS)
    held.pop()
    held.append(quota.admit(1, START_NS))
    quota.set(requests_per_s=2)
    quota.admit(1, START_NS)
    with pytest.raises(QuotaExceeded, match="2 requests/s"):
        quota.admit(1, START_NS)
    quota.set(requests_per_s=2, rows_per_s=9)
    with pytest.raises(QuotaExceeded, match="2 requests/s"):
        quota.admit(1, START_NS)  # setting again what it was fills nothing
    quota.set(requests_per_s=3)
    quota.admit(1, START_NS)
    assert (quota.requests_per_s, quota.rows_per_s, quota.max_in_flight) == (3, 0, 0)


@pytest.mark.parametrize("error", [QueueFull("full"), ServerStopping("bye")])
def test_what_no_queue_took_is_given_back(error: Exception) -> None:
    quota = Quota("x", requests_per_s=1, rows_per_s=5)
    with pytest.raises(type(error)), quota.admit(5, START_NS):
        raise error
    assert quota.counters().admitted == quota.counters().in_flight == 0
    with pytest.raises(ModelExecutionError), quota.admit(5, START_NS):
        raise ModelExecutionError("it ran")
    with pytest.raises(QuotaExceeded):
        quota.admit(1, START_NS)
    assert quota.counters().in_flight == 0


def test_admissions_outlive_their_quota() -> None:
    quota = Quota("x", max_in_flight=1)
    admission = quota.admit(1, 0)
    del quota
    admission.release(refund=True)


# ------------------------------------------------------------------------------------------------------ against a model
class Bucket:
    """Tokens as exact fractions, by the book."""

    def __init__(self, rate: int) -> None:
        self.rate, self.tokens, self.at_ns = Fraction(rate), Fraction(max(rate, 1)), 0

    def refill(self, now_ns: int) -> None:
        self.tokens = min(self.tokens + self.rate * (now_ns - self.at_ns) / SECOND_NS, Fraction(max(self.rate, 1)))
        self.at_ns = now_ns

    def find_wait_ns(self, n: int) -> int:
        lacking = min(Fraction(n), max(self.rate, Fraction(1))) - self.tokens
        return -(-lacking * SECOND_NS // self.rate).__floor__() if lacking > 0 else 0


#: Rates of which each token takes whole nanoseconds: then both are exact.
exact_rates = st.sampled_from([0, 1, 2, 4, 5, 8, 10, 100, 1000])


class QuotaMachine(RuleBasedStateMachine):
    """A quota and its model get the same requests at the same times."""

    @initialize(requests=exact_rates, rows=exact_rates, in_flight=st.integers(0, 6))
    def begin(self, requests: int, rows: int, in_flight: int) -> None:
        self.quota = Quota("t", requests_per_s=requests, rows_per_s=rows, max_in_flight=in_flight)
        self.now_ns, self.max_in_flight = START_NS, in_flight
        self.requests, self.rows = (Bucket(rate) if rate else None for rate in (requests, rows))
        self.held: list[tuple[Admission, int]] = []
        self.admitted = 0
        self.refused = {"requests": 0, "rows": 0, "in_flight": 0}

    @rule(passed_ns=st.one_of(st.integers(0, 3 * SECOND_NS), st.sampled_from([1, 10**6, 10**8, SECOND_NS])))
    def pass_time(self, passed_ns: int) -> None:
        self.now_ns += passed_ns

    def expect(self, rows: int) -> tuple[str, int] | None:
        if self.max_in_flight and len(self.held) >= self.max_in_flight:
            return "in_flight", SECOND_NS
        waits = {}
        for name, bucket, n in (("requests", self.requests, 1), ("rows", self.rows, rows)):
            if bucket is not None:
                bucket.refill(self.now_ns)
                waits[name] = bucket.find_wait_ns(n)
        longest = max(waits, key=lambda name: waits[name], default="")
        return (longest, waits[longest]) if waits and waits[longest] else None

    @rule(rows=st.one_of(st.integers(0, 12), st.integers(0, 3000)), times=st.integers(1, 5))
    def ask(self, rows: int, times: int) -> None:
        for _ in range(times):
            expected = self.expect(rows)
            try:
                admission = self.quota.admit(rows, self.now_ns)
            except QuotaExceeded as refusal:
                assert expected is not None, refusal
                assert refusal.retry_after_ns == expected[1]
                self.refused[expected[0]] += 1
                continue
            assert expected is None, f"{expected} was exceeded"
            self.held.append((admission, rows))
            self.admitted += 1
            for bucket, n in ((self.requests, 1), (self.rows, rows)):
                if bucket is not None:
                    bucket.tokens -= n

    @precondition(lambda self: self.held)
    @rule(data=st.data(), refund=st.booleans())
    def end(self, data: st.DataObject, refund: bool) -> None:
        admission, rows = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        admission.release(refund=refund)
        if refund:
            self.admitted -= 1
            for bucket, n in ((self.requests, 1), (self.rows, rows)):
                if bucket is not None:
                    bucket.refill(self.now_ns)
                    bucket.tokens = min(bucket.tokens + n, Fraction(max(bucket.rate, 1)))

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "quota"):
            counters = self.quota.counters()
            assert (counters.admitted, counters.in_flight) == (self.admitted, len(self.held))
            assert counters.refused_requests == self.refused["requests"]
            assert counters.refused_rows == self.refused["rows"]
            assert counters.refused_in_flight == self.refused["in_flight"]


TestQuotaMachine = QuotaMachine.TestCase
TestQuotaMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@given(
    rate=st.floats(0.01, 1e6),
    gaps_ns=st.lists(st.integers(0, 2 * SECOND_NS), min_size=1, max_size=60),
    rows=st.integers(1, 50),
)
@settings(max_examples=200, deadline=None)
def test_no_rate_is_exceeded_on_average_and_none_is_wasted(rate: float, gaps_ns: list[int], rows: int) -> None:
    """In any time from the start: at most what a full bucket held and what came since, plus one request's debt."""
    quota = Quota("x", rows_per_s=rate)
    now_ns, taken, cost = START_NS, 0.0, min(rows, 3600 * rate)  # one request costs at most an hour of the rate
    for gap_ns in gaps_ns:
        now_ns += gap_ns
        try:
            quota.admit(rows, now_ns)
            taken += cost
        except QuotaExceeded as refusal:
            now_ns += refusal.retry_after_ns
            quota.admit(rows, now_ns)  # its word holds
            taken += cost
        allowed = max(rate, 1) + rate * (now_ns - START_NS) / SECOND_NS + rows
        assert taken <= allowed * (1 + 1e-9)


def test_many_threads() -> None:
    """Bounds hold exactly, whoever asks at the same time; nothing stays in flight."""
    quota = Quota("x", requests_per_s=500, max_in_flight=7)
    most, lock = [0], threading.Lock()

    def ask(_: int) -> int:
        admitted = 0
        for _ in range(400):
            try:
                with quota.admit(1, START_NS):
                    with lock:
                        most[0] = max(most[0], quota.counters().in_flight)
                    admitted += 1
            except QuotaExceeded:
                pass
        return admitted

    with ThreadPoolExecutor(12) as pool:
        admitted = sum(pool.map(ask, range(12)))
    counters = quota.counters()
    assert most[0] <= 7
    assert admitted == counters.admitted == 500
    assert counters.refused_requests + counters.refused_in_flight == 12 * 400 - 500
    assert counters.in_flight == 0


# --------------------------------------------------------------------------------------------- whether it can be left
def test_what_another_object_could_take_the_place_of() -> None:
    quota = Quota("a", requests_per_s=10, rows_per_s=100)
    assert quota.is_as_new(START_NS)
    admission = quota.admit(50, START_NS)
    assert not quota.is_as_new(START_NS)
    later_ns = START_NS + SECOND_NS
    assert not quota.is_as_new(later_ns), "one is in flight"
    admission.release()
    assert quota.is_as_new(later_ns) and not quota.is_as_new(START_NS + SECOND_NS // 2 - 1)
    quota.set()
    assert quota.is_as_new(START_NS), "without bounds there is nothing to fill"


def test_a_pass_holds_it() -> None:
    passes, quota = Passes(), Quota("a", requests_per_s=10)
    assert passes.add(b"Bearer x", "m", expires_ns=2**62, generation=passes.generation, quota=quota)
    assert not quota.is_as_new(START_NS)
    passes.clear()
    assert quota.is_as_new(START_NS)
