"""The search for a setting, on curves that are known: what it chooses, and how far it says that the load can grow."""

from __future__ import annotations

import numpy as np
import pytest

from aiorch_server.config.objective import parse_objective
from aiorch_server.optimizer.arrivals import OnOff, Trace
from aiorch_server.optimizer.report import write_config
from aiorch_server.optimizer.runs import Runs
from aiorch_server.optimizer.search import Search, draw_traffic
from aiorch_server.optimizer.service_time import ServiceTime


def know(batch_ms: float, row_ms: float) -> ServiceTime:
    service = ServiceTime(8, cores=4.0)
    times_ns = {rows: (batch_ms + row_ms * rows) * 1e6 for rows in (1, 2, 4, 8)}
    runs = [Runs(rows, 400, 400 * ns, 400 * ns**2 * 1.0001) for rows, ns in times_ns.items()]
    service.observe(runs, instances=1, now_s=1.0)
    return service


def search(service: ServiceTime, slo: str, rate: float) -> Search:
    return Search(service, parse_objective(slo), draw_traffic(OnOff.steady(rate), 1), cores=4)


def test_batches_are_chosen_where_they_pay() -> None:
    best = search(know(10.0, 0.1), "p99=60ms, instances=1", 300.0).try_all()[0]
    assert best.is_met and best.knobs.max_rows >= 4


def test_no_more_instances_than_are_needed() -> None:
    assert search(know(2.0, 2.0), "p99=60ms, instances=1..4", 100.0).try_all()[0].knobs.instances == 1
    found = search(know(2.0, 8.0), "p99=60ms, instances=1..4", 200.0).try_all()
    assert found[0].is_met and found[0].knobs.instances > 1
    assert all(found[0].knobs.instances <= each.knobs.instances for each in found if each.is_met)


def test_growth_ends_where_the_model_is_busy() -> None:
    looking = search(know(10.0, 0.0), "p99=60ms, instances=1", 100.0)
    best = looking.try_all()[0]
    capacity = best.knobs.max_rows / 0.01
    assert 0.5 * capacity < looking.find_growth(best.knobs) * looking.rate <= 1.02 * capacity
    out_of_reach = search(know(10.0, 0.0), "p99=5ms, instances=1", 100.0)
    assert not out_of_reach.try_all()[0].is_met
    assert out_of_reach.find_growth(best.knobs) < 0.02


def test_a_frontier_rises_with_the_load() -> None:
    looking = search(know(10.0, 0.1), "p99=60ms, instances=1..2", 200.0)
    points = looking.find_frontier(looking.try_all()[0].knobs, 1)
    assert [round(point.rate / points[0].rate) for point in points[:4]] == [1, 2, 3, 4]
    assert points[-1].found.prediction.percentile_ns > points[0].found.prediction.percentile_ns


def test_traffic_without_requests_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to tune for"):
        Search(
            know(1.0, 1.0), parse_objective("p99=5ms"), [Trace(np.zeros(1, np.int64), np.ones(1, np.int64))], cores=1
        )


def test_the_lines_to_paste_are_read_back() -> None:
    objective = parse_objective("p99.9=1.5s, error_budget=0.02")
    knobs = search(know(1.0, 1.0), "p99=1s, max_batch_size=4", 10.0).list_candidates()[1]
    line = write_config(knobs, objective).split('string_value: "')[1].split('"')[0]
    told = parse_objective(line)
    assert (told.latency_us, told.percentile, told.error_budget) == (1_500_000, 99.9, 0.02)
    assert told.max_batch_size == knobs.max_rows and told.max_delay_us == knobs.delay_us
