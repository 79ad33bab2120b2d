"""Where the instances of a model run and how many CPU threads each gets; pure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from aiorch_server.config.placement import InstanceGroup, InstanceKind
from aiorch_server.errors import ModelLoadError

MAX_INSTANCES = 1024


@dataclass(frozen=True, slots=True)
class Place:
    """One place of an instance group: ``device`` is ``"cpu"`` or ``"cuda:<n>"``, ``threads`` its share of the CPUs."""

    device: str
    threads: int


def count_cpus() -> int:
    """CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        return os.cpu_count() or 1


def place_instances(
    groups: Sequence[InstanceGroup], *, cpus: int, default_count: int = 1, threads: int | None = None
) -> tuple[Place, ...]:
    """One place per instance of a model, in the order of its groups; ``default_count`` CPU places without groups.

    The CPUs are divided among all instances of the model instead of given to each; ``threads`` overrides the share.
    Raises ModelLoadError above MAX_INSTANCES. KIND_AUTO means the CPU unless the group names GPUs.
    """
    devices: list[str] = []
    for group in groups:
        gpus = group.gpus or ((0,) if group.kind is InstanceKind.KIND_GPU else ())
        places = [f"cuda:{gpu}" for gpu in gpus] or ["cpu"]
        devices += places * group.count
    if not groups:
        devices = ["cpu"] * max(1, default_count)
    if len(devices) > MAX_INSTANCES:
        raise ModelLoadError(f"instance_group: {len(devices)} instances in all, at most {MAX_INSTANCES} are right")
    share = threads if threads is not None else max(1, cpus // len(devices))
    return tuple(Place(device, share) for device in devices)
