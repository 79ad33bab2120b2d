"""Runs the Python examples of Triton's client project, unchanged, against this server, and prints how each ended.

    PYTHONPATH=tests/support python tests/contract/interop/run_examples.py CHECKOUT [--perf-analyzer COMMAND]

By hand, because it takes a checkout of that project, and Pillow for the image examples. COMMAND starts perf_analyzer:
its wheels need a newer C library than some systems have, so it may be the command of a loader with a library path.
Exits with 0 when all ended well.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from example_models import OTHERS, REPEATING, SIMPLE, write_models
from served import Served, serve

LIMIT_S = 90
#: What is not run, and why.
LEFT_OUT = {
    "simple_grpc_cudashm_client": "makes CUDA memory first, which takes a GPU",
    "simple_http_cudashm_client": "makes CUDA memory first, which takes a GPU",
    "memory_growth_test": "its addresses cannot be chosen",
}
#: Options of programs that are not run once, over the protocol of their name, without options.
OPTIONS: dict[str, tuple[str, ...]] = {
    "image_client": (
        *("-i grpc -c 3 IMAGES", "-i grpc -m inception -b 2 -s INCEPTION -a IMAGES", "-i grpc --streaming IMAGES"),
        *("-c 3 IMAGES", "-m inception -b 2 -s VGG -a IMAGES"),
    ),
    "grpc_image_client": ("-c 3 IMAGES", "-m inception -b 2 -a IMAGES", "-m inception --streaming IMAGES"),
    "ensemble_image_client": ("-i grpc -c 2 IMAGES", "-c 2 IMAGES"),
    "reuse_infer_objects_client": ("-i grpc", "-i http"),
    "simple_http_infer_client": ("", "--request-compression-algorithm gzip --response-compression-algorithm deflate"),
    "simple_grpc_infer_client": ("", "-C gzip"),
    **{
        f"simple_{kind}_infer_client": ("", "-d")
        for kind in ("grpc_sequence_stream", "grpc_sequence_sync", "http_sequence_sync", "grpc_aio_sequence_stream")
    },
}
DEFAULT_MODEL = {"image_client": "-m densenet_onnx", "grpc_image_client": "-m densenet_onnx"}
PERF_ANALYZER = (
    *("-m simple -i grpc", "-m simple -i http", "-m simple -i grpc --async", "-m simple -i grpc --streaming --async"),
    *("-m simple -i grpc --shared-memory system", "-m simple -i http --shared-memory system"),
    "-m simple -i grpc --grpc-compression-algorithm gzip",
    "-m simple -i grpc --collect-metrics --metrics-url METRICS/metrics",
    "-m simple_string -i grpc -b 2 --string-data 7",
    "-m simple_identity -i http --shape INPUT0:16",
    *("-m simple_dyna_sequence -i grpc", "-m simple_sequence -i grpc --streaming --async"),
    "-m repeat_int32 -i grpc --streaming --async -z --shape IN:4 --shape DELAY:4",
    "-m preprocess_inception_ensemble -i grpc --shape INPUT:1",
)
STEADY = "--measurement-mode count_windows --measurement-request-count 50 -s 900 --concurrency-range 2"


def list_programs(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.py")):
        for options in OPTIONS.get(path.stem, ("",)):
            model = "" if "-m " in options else DEFAULT_MODEL.get(path.stem, "")
            yield path.stem, f"{model} {options}".strip()


def run(command: list[str]) -> str:
    """``ok`` or the last line of what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, errors="replace")
    except subprocess.TimeoutExpired:
        return f"still running after {LIMIT_S} s"
    said = (done.stdout + done.stderr).strip().splitlines() or [""]
    return "ok" if done.returncode == 0 else f"exit status {done.returncode}: {said[-1]}"


def write_images(folder: Path) -> Path:
    folder.mkdir()
    for shade in (40, 200):
        (folder / f"{shade}.ppm").write_bytes(b"P6 64 48 255\n" + bytes((shade * each) % 256 for each in range(9216)))
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of Triton's client project")
    parser.add_argument("--perf-analyzer", default="", metavar="COMMAND", help="run this as well")
    chosen = parser.parse_args()
    examples = chosen.checkout / "src" / "python" / "examples"
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        images = write_images(Path(scratch) / "images")

        def start(name: str, models: dict[str, tuple[str, str]]) -> Served:
            options = (
                "--id",
                "triton",
                "--shared-memory",
                "on",
                "--model-control-mode",
                "explicit",
                "--load-model",
                "*",
            )
            return stack.enter_context(serve(write_models(Path(scratch) / name, models), *options))

        everything = start("all", SIMPLE | REPEATING | OTHERS)
        # those two programs count the models of the server
        special = {
            "simple_http_model_control": start("seven", SIMPLE),
            "simple_grpc_model_control": start("eight", SIMPLE | REPEATING),
        }
        print("| program | options | ended |\n|---|---|---|")
        is_well = True
        for program, options in list_programs(examples):
            site = special.get(program, everything)
            is_grpc = "-i grpc" in options or program.startswith(("simple_grpc", "grpc"))
            place = ["-u", site.grpc if is_grpc else site.http]
            words = [str(images) if word == "IMAGES" else word for word in options.split()]
            ended = LEFT_OUT.get(program) or run([sys.executable, str(examples / f"{program}.py"), *place, *words])
            is_well = is_well and ended in ("ok", LEFT_OUT.get(program))
            print(f"| {program} | {f'`{options}`' if options else ''} | {ended} |", flush=True)
        for options in PERF_ANALYZER if chosen.perf_analyzer else ():
            place = ["-u", everything.grpc if "-i grpc" in options else everything.http, *STEADY.split()]
            words = options.replace("METRICS", everything.metrics).split()
            ended = run([*shlex.split(chosen.perf_analyzer), *words, *place])
            is_well = is_well and ended == "ok"
            print(f"| perf_analyzer | `{options}` | {ended} |", flush=True)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
