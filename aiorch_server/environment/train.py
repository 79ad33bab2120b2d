"""Learns the policy of ``learned.json`` by the cross-entropy method: ``python -m aiorch_server.environment.train``.

Generation by generation, networks are drawn around a mean, tried on the same few episodes, and the mean and the spread
move to the best of them. Episodes change each generation, so that luck with one load does not last. The same seed gives
the same network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from aiorch_server.environment.evaluate import run_episode
from aiorch_server.environment.learned import FILE, SIZE, Network, write_network
from aiorch_server.environment.policies import Learned

#: Episodes whose score is written down begin here; training never sees them.
CHECK_SEED: Final = 1_000_000
_SPREAD, _LEAST_SPREAD = 1.0, 0.1
_SMOOTHED: Final = 0.3
_DURATION_S: Final = 30.0


def score(network: Network, seeds: Sequence[int], duration_s: float = _DURATION_S) -> float:
    """What it earned in the mean of these episodes."""
    return float(np.mean([run_episode(Learned(network), seed, duration_s=duration_s).earned for seed in seeds]))


def train(
    seed: int,
    *,
    generations: int,
    population: int,
    episodes: int,
    tell: Callable[[str], object] = lambda text: None,
) -> Network:
    """The mean of the last generation."""
    random = np.random.default_rng(seed)
    mean, spread = np.zeros(SIZE), np.full(SIZE, _SPREAD)
    best = max(2, population // 5)
    for generation in range(generations):
        seeds = [int(each) for each in random.integers(0, CHECK_SEED, episodes)]
        drawn = mean + spread * random.standard_normal((population, SIZE))
        drawn[0] = mean
        earned = np.array([score(Network(each), seeds) for each in drawn])
        chosen = drawn[np.argsort(earned)[::-1][:best]]
        mean = _SMOOTHED * mean + (1 - _SMOOTHED) * chosen.mean(axis=0)
        spread = np.maximum(_LEAST_SPREAD, _SMOOTHED * spread + (1 - _SMOOTHED) * chosen.std(axis=0))
        tell(
            f"{generation + 1}/{generations}: best {earned.max():.3f}, mean {earned.mean():.3f}, centre {earned[0]:.3f}"
        )
    return Network(mean)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, checks on episodes of its own, and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m aiorch_server.environment.train", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--generations", type=int, default=40)
    parser.add_argument("--population", type=int, default=30)
    parser.add_argument("--episodes", type=int, default=8, help="that each network is tried on in a generation")
    parser.add_argument("--checked", type=int, default=40, help="episodes for the score that is written down")
    parser.add_argument("--output", type=Path, default=FILE)
    told = parser.parse_args(arguments)
    counts = {name: getattr(told, name) for name in ("generations", "population", "episodes")}
    network = train(told.seed, **counts, tell=lambda text: sys.stdout.write(text + "\n"))
    seeds = range(CHECK_SEED, CHECK_SEED + told.checked)
    earned = round(score(network, seeds, 60.0), 4)
    options = " ".join(f"--{name} {count}" for name, count in {"seed": told.seed, **counts}.items())
    facts = {
        "command": f"python -m aiorch_server.environment.train {options}",
        "seed": told.seed,
        "score": earned,
        "score_of": f"earned in the mean of {told.checked} episodes of 60 s, seeds from {CHECK_SEED}",
    }
    write_network(told.output, network, facts)
    sys.stdout.write(f"earned {earned} on episodes that it had not seen; written to {told.output}\n")


if __name__ == "__main__":
    main()
