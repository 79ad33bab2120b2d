"""Where instances run, and their share of the CPUs."""

from __future__ import annotations

import pytest

from aiorch_server.config.placement import InstanceGroup
from aiorch_server.errors import ModelLoadError
from aiorch_server.execution.placement import Place, count_cpus, place_instances


@pytest.mark.parametrize(
    ("cpus", "count", "threads"), [(8, 1, 8), (8, 2, 4), (8, 3, 2), (8, 8, 1), (8, 100, 1), (1, 1, 1)]
)
def test_cpus_are_divided_and_never_oversubscribed_twice(cpus: int, count: int, threads: int) -> None:
    places = place_instances([InstanceGroup(count=count)], cpus=cpus)
    assert places == (Place("cpu", threads),) * count


def test_without_groups_the_default_count_holds_and_threads_can_be_given() -> None:
    assert place_instances([], cpus=4, default_count=2) == (Place("cpu", 2),) * 2
    assert place_instances([], cpus=4, threads=9) == (Place("cpu", 9),)


def test_groups_on_gpus() -> None:
    groups = [InstanceGroup.model_validate({"kind": "KIND_GPU", "gpus": [1, 3], "count": 2}), InstanceGroup(count=1)]
    assert [place.device for place in place_instances(groups, cpus=5)] == [
        *("cuda:1", "cuda:3", "cuda:1", "cuda:3"),
        "cpu",
    ]
    assert place_instances([InstanceGroup.model_validate({"kind": "KIND_GPU"})], cpus=2) == (Place("cuda:0", 2),)


def test_the_number_of_instances_is_bounded() -> None:
    with pytest.raises(ModelLoadError, match="2048 instances"):
        place_instances([InstanceGroup(count=1024)] * 2, cpus=2)


def test_this_machine_has_cpus() -> None:
    assert count_cpus() >= 1
