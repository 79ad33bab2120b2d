"""A tuner's decisions while the load changes: ``story.py FOLDER OUT.json`` records, ``story.py --tell OUT.json`` tells.

A server on CPU 0 serves one model of FOLDER (ONNX models of ``benchmarks/models/make.py``) with an objective, and with
a fixed delay as somebody may have copied it from elsewhere; a caller on CPU 1 sends requests at random times, whatever
becomes of those before, at rates that change in steps. Recorded: what was offered and answered within the objective in
each second, as the caller saw it from when a request was due, and what the server tells of its decisions.
``--tell`` prints that as Markdown, of which ``docs/tuning.md`` has a section.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2]))

from aiorch_server.config.objective import parse_objective
from aiorch_server.optimizer.arrivals import OnOff
from benchmarks.scenarios.foretold import HERE, MODELS, Watched, write_repository

#: Seconds that a phase lasts.
PHASE_S = 12.0
#: The delay that is written.
DELAY_US = 200_000
STORIES = {"minilm": ("p99=250ms", (30.0, 90.0, 200.0, 30.0)), "wide": ("p99=20ms", (500.0, 2500.0, 4500.0, 500.0))}


def draw(rates: tuple[float, ...], random: np.random.Generator) -> np.ndarray:
    parts = [OnOff.steady(rate).draw(PHASE_S, random) + round(at * PHASE_S * 1e9) for at, rate in enumerate(rates)]
    return np.concatenate(parts)


def record(onnx: Path, name: str, objective: str, rates: tuple[float, ...], seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        message = write_repository(folder / "models", MODELS[name], onnx, objective=objective)
        written = folder / "models" / name / "config.pbtxt"
        delay = f"dynamic_batching {{ max_queue_delay_microseconds: {DELAY_US} }}"
        written.write_text(written.read_text().replace("dynamic_batching { }", delay))
        (folder / "message").write_bytes(message)
        np.savez(folder / "times.npz", times_ns=draw(rates, random))
        with Watched(folder / "models") as server:
            arguments = [
                str(server.tell()["port"]),
                *(str(folder / each) for each in ("times.npz", "message", "out.npz")),
            ]
            caller = subprocess.Popen(["taskset", "-c", "1", sys.executable, str(HERE / "timed.py"), *arguments])
            assert caller.wait(PHASE_S * len(rates) + 60) == 0, "the caller failed"
            told = server.tell()
            offset_s = time.time() - time.monotonic()
        with np.load(folder / "out.npz") as stored:
            out = dict(stored)
    account = told["accounts"][name]
    began_ns = int(out["due_ns"][0])
    return {
        "model": name,
        "objective": objective,
        "delay_us": DELAY_US,
        "phase_s": PHASE_S,
        "rates": rates,
        "seconds": count_seconds(out, began_ns, parse_objective(objective).latency_us),
        "decisions": [{**each, "at_s": each["at_s"] - offset_s - began_ns / 1e9} for each in account["decisions"]],
        "knobs": account["knobs"],
    }


def count_seconds(out: dict[str, np.ndarray], began_ns: int, target_us: int) -> list[dict[str, int]]:
    """Requests by the second in which they were due."""
    second = ((out["due_ns"] - began_ns) // 1_000_000_000).astype(int)
    is_answered = out["code"] == 0
    is_good = is_answered & (out["answered_ns"] - out["due_ns"] <= target_us * 1000)
    return [
        {
            "offered": int(here.sum()),
            "good": int((here & is_good).sum()),
            "late": int((here & is_answered & ~is_good).sum()),
        }
        for here in (second == each for each in range(int(second.max()) + 1))
    ]


def tell(story: dict[str, Any]) -> str:
    lines = [
        "| seconds | offered/s | answered in time/s | late | refused | held again after |",
        "|---|---|---|---|---|---|",
    ]
    for number, rate in enumerate(story["rates"]):
        at = round(number * story["phase_s"])
        seconds = story["seconds"][at : at + round(story["phase_s"])]
        offered, good, late = (sum(each[key] for each in seconds) for key in ("offered", "good", "late"))
        # the first second from which on nearly nobody who was answered was late
        bad = [index for index, each in enumerate(seconds) if each["late"] > 0.05 * max(1, each["late"] + each["good"])]
        held = f"{bad[-1] + 1} s" if bad else "at once"
        length = len(seconds) or 1
        lines.append(
            f"| {at}-{at + length} | {rate:.0f} | {good / length:.1f} | {late} | {offered - good - late} | {held} |"
        )
    lines += ["", "| at | knob | from | to | why | what came of it |", "|---|---|---|---|---|---|"]
    for each in story["decisions"]:
        lines.append(
            f"| {each['at_s']:.0f} s | {each['knob']} | {each['before']:g} | {each['after']:g} | {each['reason']} "
            f"| {each['effect'] or 'not judged yet'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--model", choices=STORIES, default="minilm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tell", action="store_true", help="print the record FOLDER instead of making one")
    options = parser.parse_args()
    if not options.tell:
        objective, rates = STORIES[options.model]
        story = record(options.folder, options.model, objective, rates, options.seed)
        options.output.write_text(json.dumps(story, indent=1) + "\n")
    else:
        story = json.loads(options.folder.read_text())
    print(tell(story))


if __name__ == "__main__":
    main()
