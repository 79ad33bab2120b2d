"""Builds the core's scheduler from a model's configuration."""

from __future__ import annotations

from aiorch_server._core import ModelSpec, Scheduler
from aiorch_server.config.batching import DynamicBatching, QueuePolicy, TimeoutAction
from aiorch_server.config.model import ModelConfig
from aiorch_server.errors import ModelLoadError


def build_scheduler(config: ModelConfig, spec: ModelSpec, *, default_queue_size: int = 0) -> Scheduler:
    """A scheduler for ``spec`` with the policy of ``config``; ModelLoadError where the two contradict each other.

    A model that batches but has no ``dynamic_batching`` section gets the section's defaults: what waits when an
    instance becomes free is run together, nothing is delayed. ``default_queue_size`` bounds the queue, in requests,
    where the configuration does not (0: the core's own bound).
    """
    batching = config.dynamic_batching or DynamicBatching()
    queue = batching.default_queue_policy or QueuePolicy()
    levels = range(1, batching.priority_levels + 1)
    try:
        return Scheduler(
            spec,
            max_queue_delay_us=batching.max_queue_delay_microseconds,
            preferred_batch_sizes=batching.preferred_batch_size,
            # with levels it bounds each of them, the queue as a whole has the server's bound
            max_queue_size=default_queue_size if levels else queue.max_queue_size or default_queue_size,
            priority_levels=batching.priority_levels,
            default_priority_level=batching.default_priority_level,
            default_timeout_us=queue.default_timeout_microseconds,
            allow_timeout_override=queue.allow_timeout_override,
            delay_expired=queue.timeout_action is TimeoutAction.DELAY,
            level_policies=[_describe(batching.priority_queue_policy.get(level, queue)) for level in levels],
            preserve_ordering=batching.preserve_ordering,
        )
    except ValueError as error:
        raise ModelLoadError(f"dynamic_batching of model '{config.name}': {error}") from error


def find_queue_timeout_us(batching: DynamicBatching | None, priority: int, timeout_us: int) -> int:
    """How long a request may wait before it is refused, 0 for any time: what the core's queue does with the same terms.

    ``priority`` and ``timeout_us`` are as the caller gave them, 0 for none.
    """
    if batching is None:
        return 0
    level = priority or batching.default_priority_level
    policy = batching.priority_queue_policy.get(level, batching.default_queue_policy or QueuePolicy())
    if policy.timeout_action is TimeoutAction.DELAY:
        return 0
    limits = [policy.default_timeout_microseconds, timeout_us if policy.allow_timeout_override else 0]
    return min(filter(None, limits), default=0)


def _describe(policy: QueuePolicy) -> tuple[int, int, bool, bool]:
    """As the core's scheduler takes it."""
    return (
        policy.max_queue_size,
        policy.default_timeout_microseconds,
        policy.allow_timeout_override,
        policy.timeout_action is TimeoutAction.DELAY,
    )
