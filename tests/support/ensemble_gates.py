"""What the models of a test's ensembles and the test itself share: gates to wait at."""

from __future__ import annotations

import threading

TIMEOUT_S = 20.0

#: A model that calls ``hold("x")`` waits until the test opens that gate.
_gates: dict[str, threading.Event] = {}
_entered: dict[str, threading.Semaphore] = {}
_lock = threading.Lock()
#: Two steps that can only pass together.
meeting = threading.Barrier(2)


def _gate(name: str) -> tuple[threading.Event, threading.Semaphore]:
    with _lock:
        if name not in _gates:  # open until a test shuts it: warm-ups pass
            _gates[name], _entered[name] = threading.Event(), threading.Semaphore(0)
            _gates[name].set()
        return _gates[name], _entered[name]


def hold(name: str) -> None:
    """For models: says that it came, waits for the gate."""
    gate, entered = _gate(name)
    entered.release()
    assert gate.wait(TIMEOUT_S), f"gate '{name}' was never opened"


def shut(name: str) -> None:
    """For tests: whoever comes from now on waits."""
    with _lock:
        _gates[name], _entered[name] = threading.Event(), threading.Semaphore(0)


def open_gate(name: str) -> None:
    _gate(name)[0].set()


def wait_entered(name: str) -> None:
    assert _gate(name)[1].acquire(timeout=TIMEOUT_S), f"nobody came to gate '{name}'"
