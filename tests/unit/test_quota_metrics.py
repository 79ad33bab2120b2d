"""Quotas on /metrics."""

from __future__ import annotations

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import CollectorRegistry

from aiorch_server._core import Quota
from aiorch_server.errors import QuotaExceeded
from aiorch_server.observability.quota_metrics import QuotaCollector


def expose(*quotas: Quota) -> list[str]:
    registry = CollectorRegistry()
    registry.register(QuotaCollector(lambda: quotas))
    lines = generate_latest(registry).decode().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_nothing_without_quotas() -> None:
    assert expose() == []


def test_counts_by_tenant_and_bound() -> None:
    quota = Quota('a "b"', requests_per_s=2, rows_per_s=10, max_in_flight=2)
    with quota.admit(4, 0), quota.admit(4, 0):
        for rows, now_ns in ((1, 0), (9, 0)):
            with pytest.raises(QuotaExceeded):
                quota.admit(rows, now_ns)
        lines = expose(quota, Quota("free"))
    with pytest.raises(QuotaExceeded):
        quota.admit(0, 0)
    with pytest.raises(QuotaExceeded):
        quota.admit(10, 500_000_000)
    assert 'aiorch_quota_admitted_total{tenant="a \\"b\\""} 2.0' in lines
    assert 'aiorch_quota_in_flight{tenant="a \\"b\\""} 2.0' in lines
    assert 'aiorch_quota_refused_total{bound="in_flight",tenant="a \\"b\\""} 2.0' in lines
    assert 'aiorch_quota_admitted_total{tenant="free"} 0.0' in lines
    refused = [line.rpartition(" ")[2] for line in expose(quota) if line.startswith("aiorch_quota_refused_total")]
    assert refused == ["1.0", "1.0", "2.0"]
