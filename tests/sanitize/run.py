"""Runs tests on a core built with sanitizers, and judges what these report.

    run.py address|thread [--results FILE] FOLDER-OR-FILE... [-- PYTEST-ARGUMENT...]

Each path is run by a pytest of its own. Exit status 1 if a test fails, a sanitizer reports anything about the core, or
faults that are planted first go unnoticed. What counts as the core's: an error anywhere (it ends the process), a leak
that the core or libnghttp2 has allocated and nothing points to, a race with the core on either side.
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
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from instrumented import PACKAGES, build, find_library, make_python_path  # noqa: E402

#: Programs that nothing of ours runs in: some hang, or take minutes, with a sanitizer loaded before them.
FOREIGN = ("curl", "h2load", "node", "npm", "openssl", "prometheus", "espeak-ng", "redis-server", "gcc", "cc", "clang")
#: How much longer than usual the tests wait.
PATIENCE = 5
TEST_LIMIT_S = 120 * PATIENCE
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
PLANTED = {"address": ["leak", "overflow", "undefined"], "thread": ["race"]}
CORE = re.compile(r"/_core/[\w.-]+\.so|libnghttp2\.so")
#: Allocated by whom: the frame under malloc, or, inside of libnghttp2, its own.
ALLOCATOR = re.compile(r"#[12] .*(/_core/[\w.-]+\.so|libnghttp2\.so)")


def write_foreign(place: Path) -> Path:
    """A folder for PATH that starts the foreign programs without the sanitizer."""
    folder = place / "foreign"
    folder.mkdir(exist_ok=True)
    for name in FOREIGN:
        program = shutil.which(name)
        script = folder / name
        script.unlink(missing_ok=True)
        if program is not None:
            script.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {shlex.quote(program)} "$@"\n')
            script.chmod(0o755)
    return folder


def make_environment(kind: str, place: Path, logs: Path) -> dict[str, str]:
    common = f"log_path={logs}/{kind}:stack_trace_format='    #%n %p in %f %S (%m)'"
    environment = {
        **os.environ,
        "PYTHONPATH": make_python_path(place, HERE / "at_exit"),
        "PYTHONSAFEPATH": "1",  # the normal build lies in the current folder
        "PYTHONDONTWRITEBYTECODE": "1",
        "AIORCH_TEST_PATIENCE": str(PATIENCE),
        "PATH": f"{write_foreign(place)}{os.pathsep}{os.environ['PATH']}",
    }
    # C++ libraries that come later throw through the sanitizer's wrapper, which looks for the real one at the start
    environment["LD_PRELOAD"] = f"{find_library(LIBRARIES[kind])} {find_library('libstdc++.so')}"
    if kind == "address":
        # Python's own pools hide overflows between its objects, and what only they point to
        environment["PYTHONMALLOC"] = "malloc"
        # libraries leak at their ease, and their process ends well: what is ours is told apart in the logs
        environment["ASAN_OPTIONS"] = (
            f"{common}:exitcode=0:abort_on_error=1:leak_check_at_exit=0:malloc_context_size=6:quarantine_size_mb=64"
        )
        environment["LSAN_OPTIONS"] = "use_unaligned=1"
        environment["UBSAN_OPTIONS"] = "halt_on_error=1:print_stacktrace=1:exitcode=86"
        environment["AIORCH_UNDEFINED_LOG"] = f"{logs}/undefined"
    else:
        environment["TSAN_OPTIONS"] = (
            # memory that is refused is an answer, as it is without: there are tests of that
            f"{common}:allocator_may_return_null=1:exitcode=86:ignore_noninstrumented_modules=1:history_size=4"
            ":report_signal_unsafe=0:die_after_fork=0"
        )
        # a process that a test starts is a fork here, in which gRPC's threads would go on until it is a new program
        environment["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    return environment


def make_prefix(kind: str) -> list[str]:
    """ThreadSanitizer wants addresses where it expects them: not all kernels agree by themselves."""
    prefix = ["setarch", "-R"]
    if kind == "thread" and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
        return prefix
    return []


def split_reports(text: str) -> list[str]:
    """One text for each finding of the reports in a log."""
    marks = (
        r"(?m)^(?=(?:Direct|Indirect) leak of |=+\d+=+ERROR: |WARNING: ThreadSanitizer|.*: runtime error: |SUMMARY: )"
    )
    return [part for part in re.split(marks, text) if part.strip()]


def read_findings(logs: Path) -> list[str]:
    """What the sanitizers say against the core."""
    found = []
    for log in sorted(logs.iterdir()):
        for report in split_reports(log.read_text(errors="replace")):
            if report.startswith("Direct leak"):
                is_ours = ALLOCATOR.search(report) is not None
            elif "WARNING: ThreadSanitizer" in report:
                is_ours = CORE.search(report) is not None
            else:
                is_ours = "runtime error: " in report or (
                    "ERROR: AddressSanitizer" in report or "ERROR: ThreadSanitizer" in report
                )
            if is_ours:
                found.append(f"{log.name}:\n{report.strip()}")
    return found


def find_planted(kind: str, place: Path) -> list[str]:
    """The planted faults that went unnoticed."""
    missed = []
    flags = {"address": "address,undefined", "thread": "thread"}[kind]
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / "_core" / "planted.so"
        library.parent.mkdir()
        source = str(HERE / "planted.c")
        command = ["gcc", "-g", "-O1", "-shared", "-fPIC", f"-fsanitize={flags}", "-fno-sanitize-recover=undefined"]
        subprocess.run([*command, source, "-o", str(library)], check=True)
        for fault in PLANTED[kind]:
            logs = Path(scratch) / fault
            logs.mkdir()
            code = f"import ctypes; ctypes.CDLL({str(library)!r}).{fault}(1)"
            environment = make_environment(kind, place, logs)
            subprocess.run([*make_prefix(kind), sys.executable, "-c", code], env=environment, capture_output=True)
            if not read_findings(logs):
                missed.append(fault)
    return missed


def read_line(*command: str) -> str:
    """What a program says; nothing, where there is none."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def read_commit() -> str:
    """The last commit to what is compiled; with a plus where there are changes since."""
    changed = read_line("git", "status", "--porcelain", "-uno", "--", *PACKAGES)
    return read_line("git", "log", "-1", "--format=%h", "--", *PACKAGES) + ("+" if changed else "")


def add_result(file: Path, kind: str, path: str, row: dict[str, Any]) -> None:
    results = json.loads(file.read_text()) if file.exists() else {}
    results.setdefault(kind, {})[path] = row
    file.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def run(kind: str, place: Path, logs: Path, path: str, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """One pytest for the path; what came of it, and what the sanitizers found."""
    print(f"== {path}", flush=True)
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    commit, started = read_commit(), time.monotonic()
    command = [*make_prefix(kind), sys.executable, "-m", "pytest", path, "-q", "-p", "no:cacheprovider"]
    command += [f"--timeout={TEST_LIMIT_S}", *arguments]
    environment = make_environment(kind, place, logs)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-300:] if done.returncode == 0 else done.stdout[-8000:] + done.stderr[-2000:], flush=True)
    findings = read_findings(logs)
    for finding in findings:
        print(f"\n{finding}")
    return {
        "commit": commit,
        "compiler": f"gcc {read_line('gcc', '-dumpfullversion')}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "exit": done.returncode,
        "findings": len(findings),
        "seconds": round(time.monotonic() - started),
        "tests": (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= "),
    }, findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=LIBRARIES)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--results", type=Path)
    own, arguments = sys.argv[1:], []
    if "--" in own:
        own, arguments = own[: own.index("--")], own[own.index("--") + 1 :]
    given = parser.parse_args(own)
    place = build(given.kind)
    missed = find_planted(given.kind, place)
    if missed:
        sys.exit(f"the sanitizers do not work here: planted and not found: {', '.join(missed)}")
    print(f"== planted and found: {', '.join(PLANTED[given.kind])}", flush=True)
    rows, n_findings = {}, 0
    for path in given.paths:
        logs = ROOT / ".cache" / "sanitize" / given.kind / path.replace("/", "-")
        rows[path], findings = run(given.kind, place, logs, path, arguments)
        n_findings += len(findings)
        if given.results:
            add_result(given.results, given.kind, path, rows[path])
    failed = [path for path, row in rows.items() if row["exit"] != 0]
    print(f"\n== {given.kind}: {n_findings} findings in the core, {len(failed)} of {len(rows)} runs failed: {failed}")
    sys.exit(1 if n_findings or failed else 0)


if __name__ == "__main__":
    main()
