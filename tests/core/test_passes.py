"""The table of passes: what is found, what never is, what goes first, and that secrets and quotas are let go of."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aiorch_server._core import Passes, Quota
from aiorch_server._core.passes import hash_credential

NOW_NS = time.monotonic_ns()
HOUR_NS = 3600 * 10**9
LATER_NS = NOW_NS + HOUR_NS


def add(passes: Passes, credential: bytes, model: str = "m", **options: object) -> bool:
    options.setdefault("expires_ns", LATER_NS)
    options.setdefault("generation", passes.generation)
    return passes.add(credential, model, **options)  # type: ignore[arg-type]


def test_siphash_is_as_published() -> None:
    """Appendix A of the paper, and the first and last of the reference implementation's vectors for whole words."""
    key = bytes(range(16))
    assert hash_credential(key, bytes(range(15))) == 0xA129CA6149BE45E5
    assert hash_credential(key, b"") == 0x726FDB47DD0E0E31
    assert hash_credential(key, bytes(range(8))) == 0x93F5F5799A932462
    with pytest.raises(ValueError, match="expected 16"):
        hash_credential(b"short", b"")


# -------------------------------------------------------------------------------------------------- what does not pass
def test_only_the_whole_credential_passes() -> None:
    passes = Passes()
    token = b"Bearer " + os.urandom(1000).hex().encode()
    assert add(passes, token)
    assert passes.holds(token, "m", NOW_NS)
    for index in range(0, len(token), 97):
        changed = bytearray(token)
        changed[index] ^= 1
        assert not passes.holds(bytes(changed), "m", NOW_NS)
    for other in (b"", token[:-1], token + b" ", token[:1]):
        assert not passes.holds(other, "m", NOW_NS)
    for model in ("", "M", "m2", "m\0"):
        assert not passes.holds(token, model, NOW_NS)
    assert not passes.holds(token, "m", LATER_NS), "it ends with its last nanosecond"
    assert passes.holds(token, "m", LATER_NS - 1)


def test_a_certificate_sent_as_a_header_is_nobody() -> None:
    passes = Passes()
    add(passes, b"DER", is_certificate=True)
    assert not passes.holds(b"DER", "m", NOW_NS)
    assert passes.holds(b"DER", "m", NOW_NS, is_certificate=True)
    add(passes, b"token")
    assert not passes.holds(b"token", "m", NOW_NS, is_certificate=True)


def test_the_seam_between_credential_and_model() -> None:
    passes = Passes()
    add(passes, b"ab", "c")
    assert not passes.holds(b"a", "bc", NOW_NS)
    assert not passes.holds(b"abc", "", NOW_NS)


def test_what_is_not_added() -> None:
    passes = Passes(max_bytes=1000)
    assert not add(passes, b""), "no credential at all must never pass"
    assert not add(passes, b"x" * 1000), "larger than the table"
    assert not add(passes, b"x", expires_ns=NOW_NS - 1), "over already"
    outdated = passes.generation
    passes.clear()
    assert not add(passes, b"x", generation=outdated), "decided before the table was cleared"
    assert passes.entries == passes.used_bytes == 0
    assert not passes.holds(b"", "m", NOW_NS)
    for bounds in ({"max_entries": 0}, {"max_bytes": 0}):
        with pytest.raises(ValueError, match="at least"):
            Passes(**bounds)


# ------------------------------------------------------------------------------------------------------ against a model
CREDENTIALS = [b"a", b"b", b"ab", b"x" * 40, b"y" * 200]
MODELS = ["m", "n", ""]
credentials, models = st.sampled_from(CREDENTIALS), st.sampled_from(MODELS)


class PassMachine(RuleBasedStateMachine):
    """An ordered dictionary does the same."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = Passes(max_entries=5, max_bytes=1100)
        self.kept: OrderedDict[tuple[bytes, str, bool], int] = OrderedDict()
        self.record_bytes = self.measure_record()
        self.evicted = 0

    def measure_record(self) -> int:
        probe = Passes()
        add(probe, b"x", "")
        return probe.used_bytes - 1

    def size_of(self, key: tuple[bytes, str, bool]) -> int:
        return self.record_bytes + len(key[0]) + len(key[1])

    def used_bytes(self) -> int:
        return sum(map(self.size_of, self.kept))

    @rule(credential=credentials, model=models, is_certificate=st.booleans(), hours=st.integers(1, 3))
    def put(self, credential: bytes, model: str, is_certificate: bool, hours: int) -> None:
        key = (credential, model, is_certificate)
        expires_ns = NOW_NS + hours * HOUR_NS
        assert add(self.passes, credential, model, is_certificate=is_certificate, expires_ns=expires_ns)
        self.kept.pop(key, None)
        while self.kept and (len(self.kept) >= 5 or self.used_bytes() + self.size_of(key) > 1100):
            self.kept.popitem(last=False)
            self.evicted += 1
        self.kept[key] = expires_ns

    @rule(credential=credentials, model=models, is_certificate=st.booleans(), hours=st.integers(0, 3))
    def look(self, credential: bytes, model: str, is_certificate: bool, hours: int) -> None:
        now_ns = NOW_NS + hours * HOUR_NS
        expected = now_ns < self.kept.get((credential, model, is_certificate), 0)
        assert self.passes.holds(credential, model, now_ns, is_certificate=is_certificate) == expected

    @rule()
    def clear(self) -> None:
        self.passes.clear()
        self.kept.clear()

    @invariant()
    def numbers_agree(self) -> None:
        assert (self.passes.entries, self.passes.used_bytes) == (len(self.kept), self.used_bytes())
        assert self.passes.evicted == self.evicted


TestPassMachine = PassMachine.TestCase
TestPassMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_has_expired_goes_before_the_bounds_are_met() -> None:
    passes = Passes()
    soon = time.monotonic_ns() + 20_000_000
    for index in range(8):
        assert add(passes, b"%d" % index, expires_ns=soon)
    while time.monotonic_ns() < soon:
        time.sleep(0.001)
    add(passes, b"x")
    add(passes, b"y")
    assert (passes.entries, passes.evicted) == (2, 0)


# ------------------------------------------------------------------------------------------------------------ lifetimes
def test_passes_keep_quotas_that_nobody_else_does() -> None:
    passes = Passes(max_entries=3)
    for index in range(200):
        add(passes, b"%d" % (index % 7), quota=Quota(f"t{index}", max_in_flight=1))
        if index % 50 == 49:
            passes.clear()
    del passes


def resident_kib() -> int:
    gc.collect()
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1])


def test_memory_is_bounded_and_given_back() -> None:
    """Forty tables' worth of passes with quotas, thrown out, replaced and cleared."""

    def churn() -> None:
        passes = Passes(max_entries=1000, max_bytes=1 << 20)
        for index in range(5000):
            add(passes, b"%d" % (index % 1500) + b"x" * 800, quota=Quota("t"))
            assert passes.used_bytes <= 1 << 20 and passes.entries <= 1000
        passes.clear()

    churn()
    before = resident_kib()
    for _ in range(8):
        churn()
    assert resident_kib() < before + 2048


def test_threads_look_while_others_add_and_clear() -> None:
    """A pass that was never added is never found; what is cleared is not found afterwards."""
    passes = Passes(max_entries=64)
    is_over = threading.Event()
    wrong: list[object] = []

    def look() -> None:
        while not is_over.is_set():
            for index in range(200):
                passes.holds(b"good %d" % index, "m", NOW_NS)
                if passes.holds(b"bad %d" % index, "m", NOW_NS):
                    wrong.append(index)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for round_ in range(60):
        generation = passes.generation
        for index in range(100):
            assert add(passes, b"good %d" % index, quota=Quota("t"), generation=generation)
        if round_ % 3 == 0:
            passes.clear()
            assert passes.entries == 0 and not passes.holds(b"good 99", "m", NOW_NS)
            assert not add(passes, b"good 1", generation=generation)
    is_over.set()
    for thread in threads:
        thread.join()
    assert wrong == []
