"""Runs the fuzz targets under libFuzzer with ASan and UBSan, each for a while, and writes down what came of it.

    run.py [--seconds 60] [--targets NAME,NAME] [--results FILE]
    run.py --minimise       # writes a small corpus from the committed one and from what was found since
    run.py --shrink FILE    # a finding: a smaller one that breaks the same

Needs clang and its runtime library. The growing corpus is kept in ``.cache/fuzz/corpus``, inputs that break something
in ``.cache/fuzz/findings``; exit status 1 if there is one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from compile_targets import MODULES, compile_targets  # noqa: E402
from instrumented import build, find_library, make_python_path  # noqa: E402

CACHE = ROOT / ".cache" / "fuzz"
CORPUS = HERE / "corpus"
SANITIZERS = (
    "-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize=pointer-overflow -fno-sanitize-recover=undefined"
)
#: Bytes of the longest input, and the dictionary.
SETTINGS = {
    "session": (8192, "frames.dict"),
    "frames": (4096, ""),
    "landing": (1024, ""),
    "scan": (4096, "protobuf.dict"),
    "text": (64, "text.dict"),
    "batch": (2048, "protobuf.dict"),
    "protobuf": (1024, "protobuf.dict"),
    "response": (1024, "protobuf.dict"),
}
#: These run Python, which keeps what it allocates: a look for leaks after each input would take most of the time.
WITH_PYTHON = {"batch", "protobuf", "response"}
#: What the committed corpus may take, of one target.
CORPUS_BYTES, CORPUS_FILES = 100_000, 250


def find_clang() -> str:
    for name in ("clang", *(f"clang-{version}" for version in range(22, 13, -1))):
        if shutil.which(name):
            return name
    sys.exit("no clang found: deploy/install-packages clang libclang-rt-14-dev (or the version of your clang)")


def prepare() -> tuple[dict[str, str], Path]:
    """Everything compiled; the environment for a target's process, and libFuzzer as a shared library."""
    clang = find_clang()
    CACHE.mkdir(parents=True, exist_ok=True)
    allowed = CACHE / "covered"
    # only the compiled core's own functions guide the fuzzer, not the wrappers that the interpreter calls
    allowed.write_text("src:*\nfun:__pyx_f_*\n")
    flags = f"{SANITIZERS} -fno-omit-frame-pointer -fno-wrapv -fsanitize-coverage-allowlist={allowed}"
    place = build("fuzzer", compiler=clang, flags=f"-fsanitize-coverage-allowlist={allowed}")
    targets = CACHE / "fuzzer"
    compile_targets(targets, place, compiler=clang, flags=flags)
    library = CACHE / "libfuzzer.so"
    if not library.exists():
        archive = find_library("libclang_rt.fuzzer_no_main-x86_64.a", compiler=clang)
        whole = ["-Wl,--whole-archive", archive, "-Wl,--no-whole-archive", "-lstdc++", "-lm", "-lpthread"]
        subprocess.run([clang, "-shared", "-o", str(library), *whole], check=True)
    runtime = find_library("libclang_rt.asan-x86_64.so", compiler=clang)
    symbolizer = shutil.which("llvm-symbolizer") or shutil.which(f"llvm-symbolizer{clang.removeprefix('clang')}") or ""
    environment = {
        **os.environ,
        "PYTHONPATH": make_python_path(place, HERE, targets),
        "PYTHONSAFEPATH": "1",
        "PYTHONMALLOC": "malloc",
        # libFuzzer first: ASan has empty stand-ins of what the modules report to
        "LD_PRELOAD": f"{library} {runtime} {find_library('libstdc++.so')}",
        "ASAN_OPTIONS": "verify_asan_link_order=0:leak_check_at_exit=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "ASAN_SYMBOLIZER_PATH": symbolizer,
    }
    return environment, library


def make_command(library: Path, target: str, *arguments: str) -> list[str]:
    """libFuzzer starts itself again for some of its tasks, by the name that it was called: so there is a script."""
    script = CACHE / "start" / target
    script.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(HERE / "fuzz_one.py"), str(library), target, str(script)]
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    script.chmod(0o755)
    return [str(script), *arguments]


def read_number(text: str, pattern: str) -> int:
    found = re.findall(pattern, text)
    return int(found[-1]) if found else 0


def fuzz(target: str, seconds: int, environment: dict[str, str], library: Path) -> dict[str, int]:
    """One target for so many seconds; the figures of this run."""
    most, dictionary = SETTINGS[target]
    growing, findings = CACHE / "corpus" / target, CACHE / "findings"
    for folder in (growing, findings, CORPUS / target):
        folder.mkdir(parents=True, exist_ok=True)
    before = set(findings.glob(f"{target}-*"))
    arguments = [
        f"-max_total_time={seconds}",
        f"-max_len={most}",
        "-timeout=20",
        "-rss_limit_mb=3000",
        "-print_final_stats=1",
    ]
    arguments += [f"-artifact_prefix={findings}/{target}-", "-use_value_profile=1"]
    if target in WITH_PYTHON:
        arguments.append("-detect_leaks=0")
    if dictionary:
        arguments.append(f"-dict={HERE / 'dictionaries' / dictionary}")
    command = make_command(library, target, *arguments, str(growing), str(CORPUS / target))
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    text = done.stdout.decode(errors="replace")
    found = sorted(set(findings.glob(f"{target}-*")) - before)
    figures = {
        "executions": read_number(text, r"stat::number_of_executed_units: *(\d+)") or read_number(text, r"(?m)^#(\d+)"),
        "coverage": read_number(text, r"cov: (\d+)"),
        "features": read_number(text, r"ft: (\d+)"),
        "corpus": len(list(growing.iterdir())),
        "findings": len(found),
    }
    print(f"{target}: {figures}", flush=True)
    if done.returncode != 0 or found:
        print(text[-6000:], *found, sep="\n", flush=True)
        figures["findings"] = max(1, len(found))
    return figures


def minimise(target: str, environment: dict[str, str], library: Path) -> None:
    """The committed corpus anew: what covers something that no smaller input covers, within bounds."""
    scratch = CACHE / "minimised" / target
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    sources = [str(CORPUS / target), str(CACHE / "corpus" / target)]
    for source in sources:
        Path(source).mkdir(parents=True, exist_ok=True)
    command = make_command(library, target, "-merge=1", f"-max_len={SETTINGS[target][0]}", str(scratch), *sources)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    kept = {path for path in (CORPUS / target).iterdir() if path.name.startswith(("seed-", "finding-"))}
    for path in (CORPUS / target).iterdir():
        if path not in kept:
            path.unlink()
    room = CORPUS_BYTES - sum(path.stat().st_size for path in kept)
    held = {path.read_bytes() for path in kept}
    found = sorted(scratch.iterdir(), key=lambda path: (path.stat().st_size, path.name))
    for path in found[:: len(found) // CORPUS_FILES + 1]:  # of all sizes
        content = path.read_bytes()
        if content not in held and len(content) <= room:
            shutil.copyfile(path, CORPUS / target / path.name[:16])
            room -= len(content)
    print(f"{target}: {len(list((CORPUS / target).iterdir()))} inputs, {CORPUS_BYTES - room} bytes", flush=True)


def add_results(path: Path, target: str, seconds: int, figures: dict[str, int]) -> None:
    """Executions, time and findings add up; what is covered is that of the last run."""
    results = json.loads(path.read_text()) if path.exists() else {}
    row = results.setdefault(target, {"executions": 0, "seconds": 0, "findings": 0})
    for key, value in ({"seconds": seconds} | figures).items():
        row[key] = row[key] + value if key in ("executions", "seconds", "findings") else value
    row["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--targets", default=",".join(MODULES))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--minimise", action="store_true")
    parser.add_argument("--shrink", type=Path)
    given = parser.parse_args()
    targets = [name for name in given.targets.replace(",", " ").split() if name]
    unknown = sorted(set(targets) - set(MODULES))
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(MODULES)}")
    environment, library = prepare()
    if given.shrink:
        target = given.shrink.name.split("-")[0]
        goal = given.shrink.with_name(f"{given.shrink.name}-small")
        arguments = ["-minimize_crash=1", "-runs=100000", f"-exact_artifact_path={goal}", str(given.shrink)]
        sys.exit(subprocess.run(make_command(library, target, *arguments), env=environment).returncode)
    n_findings = 0
    for target in targets:
        if given.minimise:
            minimise(target, environment, library)
            continue
        figures = fuzz(target, given.seconds, environment, library)
        n_findings += figures["findings"]
        if given.results:
            add_results(given.results, target, given.seconds, figures)
    sys.exit(1 if n_findings else 0)


if __name__ == "__main__":
    main()
