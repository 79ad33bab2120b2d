"""``aiorch tune``: which batch size, delay and instances keep an objective under a load that is known beforehand."""

from __future__ import annotations

import asyncio
import json as json_format
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from aiorch_server.cli.admin import add_row, make_table
from aiorch_server.cli.output import CommandError, ExitCode, Json, Output, UsageError
from aiorch_server.cli.proving import ProvingGround, Trial, open_ground
from aiorch_server.cli.reference import ModelName, check_model_name
from aiorch_server.config.objective import Objective, parse_objective
from aiorch_server.errors import AiorchError
from aiorch_server.execution.placement import count_cpus
from aiorch_server.optimizer.arrivals import OnOff, Trace
from aiorch_server.optimizer.predict import Knobs
from aiorch_server.optimizer.report import FORMAT, describe_found, describe_points, write_config, write_page
from aiorch_server.optimizer.search import Found, Search, draw_traffic, repeat_trace

#: Settings that are tried on the real model, and the part of the time that their load takes; the rest measures.
_VERIFIED: Final = 3
_VERIFYING: Final = 0.6
_BURST_S: Final = 0.2
_MOST_INSTANCES: Final = 16


def tune(
    model: ModelName,
    slo: Annotated[str, typer.Option("--slo", help="The objective, as in a model's configuration: p99=50ms.")],
    repository: Annotated[Path, typer.Option("--repository", help="The folder that holds the model.")] = Path("models"),
    trace: Annotated[Path | None, typer.Option("--trace", help="Traffic that was recorded: .npz or .csv.")] = None,
    rate: Annotated[float | None, typer.Option("--rate", min=0.1, max=1e5, help="Requests/s, with no trace.")] = None,
    burst: Annotated[
        float, typer.Option("--burst", min=1, max=20, help="With --rate: the rate within bursts, in times of the mean.")
    ] = 1.0,
    rows: Annotated[int, typer.Option("--rows", min=1, max=1_000_000, help="With --rate: rows of each request.")] = 1,
    seconds: Annotated[float, typer.Option("--seconds", min=2, max=3600, help="Of load on the model, in all.")] = 30.0,
    report: Annotated[
        Path | None, typer.Option("--report", help="Writes the report there, as .html and .json; MODEL-tuning.")
    ] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="The model may be code, such as a pickle.")] = False,
    json: Json = False,
) -> None:
    """Finds the setting that keeps an objective, tries it on the real model, and writes a report."""
    output = Output(json)
    with output.guard():
        objective = _read_slo(slo)
        if (trace is None) == (rate is None):
            raise UsageError("say what comes: --trace FILE or --rate N, one of them")
        recorded = _read_trace(trace) if trace is not None else None
        if not repository.is_dir():
            raise UsageError(f"--repository {repository}: no such folder")
        traffic = (
            repeat_trace(recorded) if recorded is not None else draw_traffic(_make_bursts(rate or 1.0, burst), rows)
        )
        target = report or Path(f"{model}-tuning")
        try:
            document = asyncio.run(
                _tune(check_model_name(model), objective, traffic, repository, seconds, allow_code, output)
            )
        except AiorchError as error:
            raise CommandError(str(error), ExitCode.REFUSED) from error
        except KeyboardInterrupt:
            raise CommandError("interrupted", ExitCode.INTERRUPTED) from None
        document["traffic"]["source"] = str(trace) if trace is not None else f"{rate:g} requests/s, bursts {burst:g}"
        files = {kind: str(target.with_name(f"{target.name}.{kind}")) for kind in ("html", "json")}
        try:
            Path(files["html"]).write_text(write_page(document))
            Path(files["json"]).write_text(json_format.dumps(document, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise UsageError(f"--report {target}: {error.strerror}") from error
        output.show(
            {"tuning": document, "files": files}, *_render(document), f"report: {files['html']}, {files['json']}"
        )
        if not document["is_met"]:
            raise CommandError(document["verdict"], ExitCode.REFUSED)


async def _tune(
    model: str,
    objective: Objective,
    traffic: list[Trace],
    repository: Path,
    seconds: float,
    allow_code: bool,
    output: Output,
) -> dict[str, Any]:
    cores = count_cpus()
    with _progress(output) as tell:
        async with open_ground(model, repository, allow_code=allow_code, cores=cores) as ground:
            ground.check(traffic[0])
            bounded = _bound_instances(objective, ground, cores)
            counts = sorted({1, bounded.min_instances, min(2, bounded.max_instances)}) if ground.can_grow else [1]
            await ground.measure(counts, seconds * (1 - _VERIFYING), lambda part: tell("measuring", part))
            search = Search(ground.service_time, bounded, traffic, cores=cores)
            found = await asyncio.to_thread(search.try_all, lambda part: tell("simulating", part))
            tried = []
            for number, each in enumerate(_choose_best(found), 1):
                load = _cut(traffic[0], seconds * _VERIFYING / _VERIFIED)
                tried.append((each, await ground.verify(each.knobs, bounded, load)))
                tell("verifying", number / _VERIFIED)
            tell("looking further", 0.0)
            return await asyncio.to_thread(_document, ground, objective, search, found, tried)


def _document(
    ground: ProvingGround, objective: Objective, search: Search, found: list[Found], tried: list[tuple[Found, Trial]]
) -> dict[str, Any]:
    kept = [pair for pair in tried if _is_kept(pair[1], objective)]
    chosen, trial = kept[0] if kept else max(tried, key=lambda pair: pair[1].good)
    more = Knobs(chosen.knobs.max_rows, chosen.knobs.delay_us, True, True, chosen.knobs.instances + 1)
    growth, more_growth = search.find_growth(chosen.knobs), search.find_growth(more)
    best, rate = found[0], search.rate
    target = f"{objective.percentile:g} % of answers within {objective.latency_us / 1000:g} ms"
    knobs = chosen.knobs
    said = f"batches of up to {knobs.max_rows}, a delay of {knobs.delay_us} us and {knobs.instances} instance(s)"
    if kept and chosen.is_met:
        verdict = f"{target} at {rate:.4g} requests/s: {said} keep it, and did on the real model"
    elif kept:
        verdict = f"{target} at {rate:.4g} requests/s: {said} kept it on the real model, which was not expected"
    elif best.is_met:
        verdict = (
            f"{target} at {rate:.4g} requests/s: expected of {said}, but on the real model {trial.good:.1%} of the "
            "requests were answered in time"
        )
    else:
        verdict = (
            f"no setting keeps {target} at {rate:.4g} requests/s; the best reachable is {trial.good:.1%} of the "
            f"requests in time, with {said}; these keep it up to {growth * rate:.4g} requests/s"
        )
    return {
        "format": FORMAT,
        "model": ground.model,
        "version": ground.version,
        "objective": str(objective),
        "is_met": bool(kept),
        "verdict": verdict,
        "traffic": {"rate": round(rate, 3), "requests": sum(len(each) for each in search.traffic)},
        "chosen": {**describe_found(chosen), "growth": round(growth, 3), "verified": asdict(trial)},
        "one_more_instance": {
            **describe_found(search.predict(more)),
            "growth": round(more_growth, 3),
            "frontier": describe_points(search.find_frontier(chosen.knobs, more.instances)),
        },
        "frontier": describe_points(search.find_frontier(chosen.knobs, chosen.knobs.instances)),
        "verified": [_compare(each, done, objective) for each, done in tried],
        "curve": [
            {"rows": each.rows, "ms": round(each.mean_ns / 1e6, 4), "error_ms": round(each.error_ns / 1e6, 4)}
            for each in ground.service_time.estimates(1)
        ],
        "candidates": [describe_found(each) for each in found],
        "config": write_config(chosen.knobs, objective),
    }


def _compare(found: Found, trial: Trial, objective: Objective) -> dict[str, Any]:
    told = describe_found(found)
    measured = {name: None if value is None else round(value, 4) for name, value in asdict(trial).items()}
    return {
        **{name: told[name] for name in ("max_batch_size", "delay_us", "instances")},
        "predicted_ms": told["percentile_ms"],
        "predicted_error_ms": told["percentile_error_ms"],
        "verified_ms": measured["percentile_ms"],
        "verified_low_ms": measured["low_ms"],
        "verified_high_ms": measured["high_ms"],
        "predicted_good": told["good"],
        "verified_good": measured["good"],
        "verified_goodput": measured["goodput"],
        "requests": trial.requests,
        "is_kept": _is_kept(trial, objective),
    }


def _is_kept(trial: Trial, objective: Objective) -> bool:
    return trial.good >= 1.0 - objective.allowed_misses


def _choose_best(found: list[Found]) -> list[Found]:
    """The best, and the best of other batch sizes."""
    best: dict[int, Found] = {}
    for each in found:
        best.setdefault(each.knobs.max_rows, each)
    return list(best.values())[:_VERIFIED]


def _bound_instances(objective: Objective, ground: ProvingGround, cores: int) -> Objective:
    if not ground.can_grow:
        return replace(objective, min_instances=ground.written_instances, max_instances=ground.written_instances)
    most = objective.max_instances or max(cores, objective.min_instances)
    if most > _MOST_INSTANCES:
        raise UsageError(f"--slo instances: {most} are more than the {_MOST_INSTANCES} that are tried")
    return replace(objective, max_instances=most)


def _read_slo(slo: str) -> Objective:
    try:
        objective = parse_objective(slo)
    except ValueError as error:
        raise UsageError(f"--slo: {error}") from error
    if not objective.latency_us:
        raise UsageError(f"--slo '{slo}' names no latency; such as p99=50ms is right")
    return objective


def _read_trace(path: Path) -> Trace:
    try:
        trace = Trace.load(path)
    except OSError as error:
        raise UsageError(f"--trace {path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"--trace {path}: {error}") from error
    if len(trace) < 2 or trace.duration_s <= 0:
        raise UsageError(f"--trace {path} holds {len(trace)} requests: two at different times are the least")
    return trace


def _make_bursts(rate: float, burst: float) -> OnOff:
    """Half of the requests come in bursts."""
    if burst == 1.0:
        return OnOff.steady(rate)
    part = 1.0 / (2.0 * burst)
    return OnOff(burst * rate, 0.5 * rate / (1.0 - part), _BURST_S, _BURST_S * (1.0 - part) / part)


def _cut(trace: Trace, seconds: float) -> Trace:
    count = max(2, int(trace.times_ns.searchsorted(round(seconds * 1e9), side="right")))
    return Trace(trace.times_ns[:count], trace.rows[:count])


@contextmanager
def _progress(output: Output) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    quiet = output.is_json or not output.is_terminal
    with Progress(*columns, console=output.console, transient=True, disable=quiet) as progress:
        task = progress.add_task("loading", total=1.0)
        yield lambda what, part: progress.update(task, description=what, completed=part)


def _render(document: dict[str, Any]) -> Iterator[str | Table]:
    yield document["verdict"]
    table = make_table("batch", "delay us", "instances", "predicted ms", "verified ms", "95 %", "in time", "kept")
    for each in document["verified"]:
        bounds = f"{_write(each['verified_low_ms'])}..{_write(each['verified_high_ms'])}"
        add_row(
            table, each["max_batch_size"], each["delay_us"], each["instances"],
            f"{each['predicted_ms']:.4g} +- {each['predicted_error_ms']:.2g}", _write(each["verified_ms"]), bounds,
            f"{each['verified_good']:.2%}", "yes" if each["is_kept"] else "no",
        )  # fmt: skip
    yield table
    chosen, more, rate = document["chosen"], document["one_more_instance"], document["traffic"]["rate"]
    yield (
        f"it keeps the objective up to {chosen['growth'] * rate:.4g} requests/s, with one more instance up to "
        f"{more['growth'] * rate:.4g}"
    )
    yield f"to paste into config.pbtxt:\n{document['config']}"


def _write(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"
