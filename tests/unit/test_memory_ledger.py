"""What devices give, and the settings that say so."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from aiorch_server.config.server import LifecycleConfig
from aiorch_server.lifecycle.memory import MemoryLedger, measure_files, read_resident_bytes, write_size
from aiorch_server.lifecycle.scale import Scale

GIB = 1 << 30


@pytest.mark.parametrize("text", ["cuda:0", "cuda:0=", "cuda=1GiB", "cpu=1GiB", "cuda:0=1GB", "cuda:0=-1", "=1", ""])
def test_a_budget_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="cuda:0=8GiB"):
        LifecycleConfig.model_validate({"device_budgets": [text]})


def test_a_device_has_one_budget() -> None:
    with pytest.raises((ValidationError, ValueError), match="a device has one budget"):
        LifecycleConfig.model_validate({"device_budgets": ["cuda:0=1GiB", "cuda:0=2GiB"]})


def test_a_pattern_that_no_name_can_have_is_refused() -> None:
    with pytest.raises(ValidationError):
        LifecycleConfig.model_validate({"load_on_demand": ["../*"]})


def test_budgets_are_read_by_device() -> None:
    config = LifecycleConfig.model_validate(
        {"device_budgets": ["cuda:0=8GiB", "cuda:1=1.5GiB", "cuda:2=100"], "memory_budget_bytes": 7}
    )
    assert config.budgets == {"cpu": 7, "cuda:0": 8 * GIB, "cuda:1": 3 * GIB // 2, "cuda:2": 100}
    assert LifecycleConfig().budgets == {}


def test_each_device_is_counted_for_itself() -> None:
    ledger = MemoryLedger({"cuda:0": 100, "cuda:1": 50})
    first = ledger.take("a:1", {"cuda:0": 60, "cuda:1": 40, "cpu": GIB})
    assert first is not None
    assert ledger.take("b:1", {"cuda:0": 30, "cuda:1": 20}) is None
    assert ledger.find_lack({"cuda:0": 30, "cuda:1": 20}) == {"cuda:1": 10}
    assert "cuda:1: it needs 20 bytes, the memory budget is 50 bytes, taken by 'a:1' 40 bytes" in ledger.explain(
        "b:1", {"cuda:0": 30, "cuda:1": 20}
    )
    second = ledger.take("b:1", {"cuda:0": 30})
    assert second is not None
    first.settle({"cuda:0": 90})
    assert ledger.find_excess() == {"cuda:0": 20}
    assert ledger.list_charges() == [("a", 1, {"cuda:0": 90}), ("b", 1, {"cuda:0": 30})]
    first.release()
    first.release()
    assert ledger.find_excess() == {}
    assert ledger.list_holders("cuda:0") == "'b:1' 30 bytes"


def test_a_measurement_counts_where_nothing_else_was_loaded_and_the_framework_was_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = iter(range(100, 1000, 30))
    monkeypatch.setattr("aiorch_server.lifecycle.scale.read_resident_bytes", lambda: next(sizes))
    scale = Scale()
    with scale.weighing() as first:
        pass
    assert scale.judge(first, "onnxruntime") is None  # it brought its libraries
    with scale.weighing() as alone:
        pass
    assert scale.judge(alone, "onnxruntime") == 30
    with scale.weighing() as outer, scale.weighing() as inner:
        pass
    assert scale.judge(outer, "onnxruntime") is None
    assert scale.judge(inner, "onnxruntime") is None
    scale.remember("m", 1, "one", 5)
    assert (scale.recall("m", 1, "one"), scale.recall("m", 1, "other")) == (5, None)


def test_the_process_has_memory() -> None:
    assert read_resident_bytes() > 10 << 20


def test_files_are_measured_in_the_folder_of_the_artefact(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"12345")
    (tmp_path / "deep" / "model.data").write_bytes(b"123")
    assert measure_files(tmp_path / "model.onnx") == measure_files(tmp_path) == 8
    assert (write_size(1536 << 20), write_size(12)) == ("1.5 GiB", "12 bytes")
