"""One quota for each tenant, whatever else changes: a fresh one would be a full one."""

from __future__ import annotations

import pytest

from aiorch_server.errors import QuotaExceeded
from aiorch_server.security import quotas
from aiorch_server.security.quotas import QuotaBook, QuotaBounds

SECOND_NS = 1_000_000_000
START_NS = 77 * SECOND_NS


class Clock:
    now_ns = START_NS

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_bounds_that_are_dropped_do_not_bind_who_holds_the_quota(clock: Clock) -> None:
    """Passes of the compiled door count with the quota that they were given, for as long as they last."""
    book = QuotaBook(clock=clock)
    book.replace([QuotaBounds("a", requests_per_s=1)])
    held = book.find("a")
    assert held is not None
    admission = held.admit(1, START_NS)
    with pytest.raises(QuotaExceeded):
        held.admit(1, START_NS)
    book.replace([])
    assert book.find("a") is None
    held.admit(1, START_NS)
    book.replace([QuotaBounds("a", max_in_flight=1)])
    assert book.find("a") is held, "what is in flight is counted on"
    with pytest.raises(QuotaExceeded, match="1 requests in flight"):
        held.admit(1, START_NS)
    del admission
    held.admit(1, START_NS)


def test_no_number_of_other_tenants_fills_a_bucket(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "MAX_TENANTS", 20)
    book = QuotaBook([QuotaBounds("*", requests_per_s=1)], clock=clock)
    empty = book.find("hammer")
    assert empty is not None
    empty.admit(1, START_NS)
    del empty
    for number in range(200):
        found = book.find(f"t{number}")
        assert found is not None and len(book._kept) <= 20
        del found
    again = book.find("hammer")
    assert again is not None
    with pytest.raises(QuotaExceeded):
        again.admit(1, START_NS)


def test_who_comes_when_all_are_busy_is_told_to_come_later(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "MAX_TENANTS", 5)
    book = QuotaBook([QuotaBounds("*", requests_per_s=1)], clock=clock)
    for number in range(5):
        book.find(f"t{number}").admit(1, START_NS)  # type: ignore[union-attr]
    with pytest.raises(QuotaExceeded, match="5 tenants with quotas") as caught:
        book.find("late")
    assert caught.value.retry_after_ns == SECOND_NS
    assert book.find("t0") is not None, "who is counted already goes on"
    clock.now_ns += SECOND_NS
    assert book.find("late") is not None


def test_a_call_that_goes_on_keeps_its_tenants_quota(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that was idle for long would count with one quota, and the tenant's other calls with another."""
    monkeypatch.setattr(quotas, "MAX_TENANTS", 2)
    book = QuotaBook([QuotaBounds("*", requests_per_s=1)], clock=clock)
    held = book.find("a")
    for number in range(10):
        book.find(f"t{number}")
    assert "a" not in book._kept and book.find("a") is held
    book.find("t0"), book.find("t1")
    assert "a" not in book._kept
    book.replace([QuotaBounds("a", requests_per_s=7)])
    assert held is not None and held.requests_per_s == 7
