"""``make chaos``: kill -9 at many random moments, a database that stands still, a disk that gets full.

Prints a table as it goes, writes JSON, and ends with 1 where something failed; the seed and a timeline tell how.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from chaos_campaign import campaign  # noqa: E402
from chaos_mishaps import fill_disk, stop_database  # noqa: E402
from databases import new_database  # noqa: E402

#: Rounds with one database.
PART = 10
COLUMNS = (
    "rounds", "kills", "kills_of_starts", "acknowledged", "refused", "unacknowledged", "made_unanswered", "repeats",
    "versions", "rollouts", "requests_answered", "requests_failed", "requests_wrong", "requests_unconnected", "took_s",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50, help="kills of SQLite's server, and of PostgreSQL's two")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stopped-s", type=float, default=30.0, help="how long the database stands still")
    parser.add_argument("--only", choices=("sqlite", "postgresql", "stop", "disk"), help="this part alone")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    rounds, seed = arguments.rounds, arguments.seed
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "sqlite": lambda _: run_campaigns("sqlite", 1, rounds, seed),
        "postgresql": lambda _: run_campaigns("postgresql", 2, rounds, seed),
        "stop": lambda folder: stop_database(folder, arguments.stopped_s, seed=seed),
        "disk": lambda folder: fill_disk(folder, new_database("sqlite", folder), attempts=20, seed=seed),
    }
    results: dict[str, Any] = {"seed": seed}
    for name, run in parts.items():
        if arguments.only not in (None, name):
            continue
        print(f"== {name}", flush=True)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"aiorch-chaos-{name}-") as folder:
            try:
                results[name] = run(Path(folder))
            except Exception:
                traceback.print_exc()
                results[name] = {"has_failed": True}
        results[name]["took_s"] = round(time.monotonic() - began, 1)
        print_table(results[name])
    if arguments.results is not None:
        arguments.results.write_text(json.dumps(results, indent=2) + "\n")
        print(f"== written to {arguments.results}")
    return int(any(isinstance(each, dict) and each.get("has_failed", False) for each in results.values()))


def run_campaigns(kind: str, n_servers: int, rounds: int, seed: int) -> dict[str, Any]:
    """The figures of so many rounds over databases of this kind, a new one after each PART; a part has its own seed."""
    results = []
    for part, begin in enumerate(range(0, rounds, PART)):
        with tempfile.TemporaryDirectory(prefix=f"aiorch-chaos-{kind}-") as folder:
            results.append(run_campaign(Path(folder), kind, n_servers, min(PART, rounds - begin), seed + part))
        print(f"   after {begin + results[-1]['rounds']} rounds: {results[-1]}", flush=True)
    return {key: merge(key, [each[key] for each in results]) for key in results[0]}


def run_campaign(folder: Path, kind: str, n_servers: int, rounds: int, seed: int) -> dict[str, Any]:
    """The figures of one part."""
    with campaign(folder, new_database(kind, folder), seed=seed, n_servers=n_servers) as found:
        found.run(rounds)
        return found.result()


def merge(key: str, values: list[Any]) -> Any:
    """One figure of all parts: the most for what is the longest, the median of medians, else the sum."""
    if key.startswith("longest"):
        return max(values)
    return sorted(values)[len(values) // 2] if key.startswith("median") else sum(values)


def print_table(result: dict[str, Any]) -> None:
    """One line for each figure, the well-known ones first."""
    for name in (*(each for each in COLUMNS if each in result), *(each for each in result if each not in COLUMNS)):
        print(f"   {name.replace('_', ' '):28} {result[name]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
