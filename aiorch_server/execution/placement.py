"""Where the instances of a model run and how many CPU threads each gets; pure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from aiorch_server.config.placement import InstanceGroup, InstanceKind, RateLimiter
from aiorch_server.errors import ModelLoadError

MAX_INSTANCES = 1024


@dataclass(frozen=True, slots=True)
class Place:
    """One place of an instance group: ``device`` is ``"cpu"`` or ``"cuda:<n>"``, ``threads`` its share of the CPUs.

    ``limiter`` is what its group says about resources.
    """

    device: str
    threads: int
    limiter: RateLimiter | None = None


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
    limiters: list[RateLimiter | None] = []
    for group in groups:
        gpus = group.gpus or ((0,) if group.kind is InstanceKind.KIND_GPU else ())
        places = [f"cuda:{gpu}" for gpu in gpus] or ["cpu"]
        devices += places * group.count
        limiters += [group.rate_limiter] * len(places) * group.count
    if not groups:
        devices = ["cpu"] * max(1, default_count)
        limiters = [None] * len(devices)
    if len(devices) > MAX_INSTANCES:
        raise ModelLoadError(f"instance_group: {len(devices)} instances in all, at most {MAX_INSTANCES} are right")
    share = threads if threads is not None else max(1, cpus // len(devices))
    return tuple(Place(device, share, limiter) for device, limiter in zip(devices, limiters, strict=True))
