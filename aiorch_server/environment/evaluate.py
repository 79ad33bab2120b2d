"""Tries policies on the same episodes: ``python -m aiorch_server.environment.evaluate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from aiorch_server.environment.batching import BatchingEnvironment
from aiorch_server.environment.policies import POLICIES, Policy
from aiorch_server.environment.workload import KINDS, MOST_INSTANCES


@dataclass(frozen=True, slots=True)
class Score:
    """Of one episode: what was earned in parts of what all requests in time would bring, the part of requests that were
    answered in time, and the instances in the mean.
    """

    kind: str
    earned: float
    in_time: float
    instances: float


def run_episode(policy: Policy, seed: int, *, duration_s: float = 60.0, kind: str = "") -> Score:
    """One episode; the same traffic for each policy of the same seed, whatever its windows."""
    environment = BatchingEnvironment(duration_s, policy.window_s, kind)
    observation, _ = environment.reset(seed=seed)
    policy.begin(environment)
    earned, instances, windows, is_over = 0.0, 0, 0, False
    while not is_over:
        observation, reward, _, is_over, _ = environment.step(policy.act(observation))
        earned += float(reward)
        instances += environment.choice.instances
        windows += 1
    work, seen = environment.workload, environment.seen
    part = seen.in_time / max(1, seen.arrivals)
    return Score(work.kind, earned / work.duration_s, part, instances / windows)


def show(scores: dict[str, list[Score]]) -> str:
    """A table: means with standard errors, and what was earned by kind of traffic."""
    kinds = [kind for kind in KINDS if any(each.kind == kind for found in scores.values() for each in found)]
    lines = [f"| policy | earned | in time | instances | {' | '.join(kinds)} |", f"|---|{'---|' * (3 + len(kinds))}"]
    for name, found in scores.items():
        earned = np.array([each.earned for each in found])
        error = earned.std(ddof=1) / np.sqrt(len(found)) if len(found) > 1 else 0.0
        by_kind = [np.mean([each.earned for each in found if each.kind == kind]) for kind in kinds]
        in_time = np.mean([each.in_time for each in found])
        instances = np.mean([each.instances for each in found])
        cells = " | ".join(f"{each:.3f}" for each in by_kind)
        lines.append(f"| {name} | {earned.mean():.3f} ± {error:.3f} | {in_time:.3f} | {instances:.2f} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, or all scores as JSON."""
    parser = argparse.ArgumentParser(prog="python -m aiorch_server.environment.evaluate", description=__doc__)
    parser.add_argument("--policies", default=",".join(POLICIES), help="names with commas between: %(default)s")
    parser.add_argument("--episodes", type=int, default=40, help="of each policy: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=2_000_000, help="of the first episode, none that was trained on: %(default)s"
    )
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of an episode: %(default)s")
    parser.add_argument(
        "--instances", type=int, default=MOST_INSTANCES, help="of policies that leave them alone: %(default)s"
    )
    parser.add_argument("--json", action="store_true", help="each score instead of the table")
    told = parser.parse_args(arguments)
    names = told.policies.split(",")
    if unknown := [name for name in names if name not in POLICIES]:
        parser.error(f"no such policy: {', '.join(unknown)}; there are {', '.join(POLICIES)}")
    if told.episodes < 1 or not 1 <= told.instances <= MOST_INSTANCES:
        parser.error(f"at least one episode, and 1 to {MOST_INSTANCES} instances")
    scores = {
        name: [
            run_episode(POLICIES[name](told.instances), told.seed + number, duration_s=told.duration)
            for number in range(told.episodes)
        ]
        for name in names
    }
    if told.json:
        text = json.dumps({name: [asdict(each) for each in found] for name, found in scores.items()}, indent=1)
    else:
        text = show(scores)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
