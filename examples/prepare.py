"""Builds the example repository: real models from real data, offline, each framework in a process of its own.

::

    python examples/prepare.py [models] [--reference FOLDER] [--only NAME ...] [--force]

What is there and unchanged is left alone: a stamp beside the references holds the recipe's digest and those of all the
files that it made. For each model ``<reference>/<model>.npz`` holds rows (``input.<name>``) and the framework's own
answers (``output.<name>``); BYTES are kept as fixed-size byte strings.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

RECIPES_FOLDER = Path(__file__).resolve().parent / "recipes"
RECIPE_DEADLINE_S = 300.0
AT_ONCE = 2

#: These models are small: more threads, a GPU or a just-in-time compiler would cost more than they save.
QUIET_AND_SMALL = {
    "CUDA_VISIBLE_DEVICES": "",
    "KERAS_BACKEND": "tensorflow",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A script under ``recipes/``, the models that it makes, and the distributions that it needs."""

    name: str
    models: tuple[str, ...]
    needs: tuple[str, ...]

    @property
    def script(self) -> Path:
        """Where the script is."""
        return RECIPES_FOLDER / f"{self.name}.py"


DATA = Recipe("digits", (), ("scikit-learn",))
RECIPES = (
    Recipe("keras_net", ("digits_keras",), ("tensorflow-cpu", "keras")),
    Recipe("cnn", ("digits_cnn", "digits_cnn_ts"), ("torch",)),
    Recipe("forest", ("digits_forest",), ("scikit-learn", "skl2onnx", "onnxruntime")),
    Recipe("pipeline", ("digits_pipeline",), ("scikit-learn", "skops")),
    Recipe("filetype", ("filetype",), ("magika", "onnxruntime")),
    Recipe("plain", ("identity_fp32", "text_length"), ()),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a recipe ended: ``built``, ``kept``, ``skipped`` or ``failed``, and what there is to say about it."""

    recipe: Recipe
    state: str
    text: str
    seconds: float = 0.0


class Kitchen:
    """The two folders that recipes write to; every recipe works in a private folder and is moved in when it is done."""

    def __init__(self, models: Path, references: Path, *, is_forced: bool) -> None:
        self.models = models
        self.references = references
        self._is_forced = is_forced
        models.mkdir(parents=True, exist_ok=True)
        references.mkdir(parents=True, exist_ok=True)

    def cook(self, recipe: Recipe) -> Outcome:
        """Runs a recipe unless its models are there already."""
        begin = time.monotonic()
        missing = [name for name in recipe.needs if not _find_version(name)]
        if missing:
            text = f"not installed: {', '.join(missing)} (pip install 'aiorchestrator[examples]')"
            return Outcome(recipe, "skipped", text)
        digest = self._digest_recipe(recipe)
        kept = None if self._is_forced else self._read_stamp(recipe, digest)
        if kept is not None:
            return Outcome(recipe, "kept", kept)
        with tempfile.TemporaryDirectory(prefix=".preparing-", dir=self.models) as private:
            models, references = Path(private) / "models", Path(private) / "references"
            models.mkdir()
            references.mkdir()
            data = self.references / "digits.npz"
            if data.exists():
                shutil.copyfile(data, references / data.name)
            text, is_done = _run(recipe, models, references)
            if not is_done:
                return Outcome(recipe, "failed", text, time.monotonic() - begin)
            files = self._move_in(recipe, models, references)
        stamp = {"digest": digest, "text": text, "files": files}
        self._stamp_path(recipe).write_text(json.dumps(stamp, indent=1))
        return Outcome(recipe, "built", text, time.monotonic() - begin)

    def _move_in(self, recipe: Recipe, models: Path, references: Path) -> dict[str, str]:
        """Replaces models and references by the new ones; the digests of all files."""
        files: dict[str, str] = {}
        for name in recipe.models:
            target = self.models / name
            if target.exists():
                shutil.rmtree(target)
            (models / name).rename(target)
            for path in sorted(target.rglob("*")):
                if path.is_file():
                    files[f"models/{path.relative_to(self.models).as_posix()}"] = _digest(path)
        for path in sorted(references.glob("*.npz")):
            if path.name == "digits.npz" and recipe is not DATA:
                continue
            target = self.references / path.name
            shutil.move(path, target)
            files[f"references/{path.name}"] = _digest(target)
        return files

    def _read_stamp(self, recipe: Recipe, digest: str) -> str | None:
        """What the recipe said when it last ran, if it made exactly the files that are there now."""
        try:
            stamp = json.loads(self._stamp_path(recipe).read_text())
            if stamp["digest"] != digest:
                return None
            for name, wanted in stamp["files"].items():
                kind, _, relative = name.partition("/")
                if _digest((self.models if kind == "models" else self.references) / relative) != wanted:
                    return None
            # An empty version folder, which holds no file, must be there too.
            if not all((self.models / name / "1").is_dir() for name in recipe.models):
                return None
            return str(stamp["text"])
        except (OSError, ValueError, KeyError):
            return None

    def _stamp_path(self, recipe: Recipe) -> Path:
        return self.references / f".{recipe.name}.json"

    def _digest_recipe(self, recipe: Recipe) -> str:
        parts = [_digest(recipe.script), _digest(DATA.script)]
        parts += [f"{name}=={_find_version(name)}" for name in (*recipe.needs, "numpy")]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _find_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        # The GPU and nightly builds have names of their own; what counts is that one of them is there.
        others = {"tensorflow-cpu": "tensorflow", "onnxruntime": "onnxruntime-gpu"}
        return _find_version(others[distribution]) if distribution in others else None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(recipe: Recipe, models: Path, references: Path) -> tuple[str, bool]:
    """Runs a recipe's script: its last line and whether it went well; on failure the end of what it wrote."""
    environment = {**os.environ, **QUIET_AND_SMALL}
    command = [sys.executable, str(recipe.script), str(models), str(references)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RECIPE_DEADLINE_S,
        )
    except subprocess.TimeoutExpired:
        return f"not done after {RECIPE_DEADLINE_S:.0f} s", False
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0:
        return f"exit code {done.returncode}\n" + "\n".join(lines[-15:]), False
    return (lines[-1] if lines else ""), True


def prepare(
    models: Path,
    references: Path,
    console: Console,
    *,
    only: Sequence[str] = (),
    is_forced: bool = False,
) -> list[Outcome]:
    """Builds what is missing, two recipes at a time, and shows how it goes; what failed is among the outcomes."""
    kitchen = Kitchen(models, references, is_forced=is_forced)
    wanted = [recipe for recipe in RECIPES if not only or set(only) & {recipe.name, *recipe.models}]
    outcomes: list[Outcome] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, ThreadPoolExecutor(AT_ONCE) as pool:

        def cook(recipe: Recipe) -> Outcome:
            task = progress.add_task(f"{recipe.name}: {', '.join(recipe.models) or 'the data'}")
            try:
                outcome = kitchen.cook(recipe)
            finally:
                progress.remove_task(task)
            _show(progress.console, outcome)
            return outcome

        outcomes.append(cook(DATA))
        if outcomes[0].state == "failed":
            return outcomes
        running: list[Future[Outcome]] = [pool.submit(cook, recipe) for recipe in wanted]
        outcomes += [future.result() for future in running]
    return outcomes


def _show(console: Console, outcome: Outcome) -> None:
    color = {"built": "green", "kept": "cyan", "skipped": "yellow", "failed": "red"}[outcome.state]
    names = ", ".join(outcome.recipe.models) or "digits data"
    console.print(f"[{color}]{outcome.state:>8}[/]  [bold]{names}[/]  ", end="")
    seconds = f"  ({outcome.seconds:.1f} s)" if outcome.seconds else ""
    console.print(outcome.text + seconds, markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 when a recipe failed."""
    parser = argparse.ArgumentParser(description="Build the example model repository.")
    parser.add_argument(
        "models", nargs="?", type=Path, default=Path("models"), help="model repository (default: models)"
    )
    parser.add_argument("--reference", type=Path, help="folder for reference answers (default: beside the repository)")
    known = [name for recipe in RECIPES for name in (recipe.name, *recipe.models)]
    parser.add_argument("--only", nargs="+", choices=known, default=[], metavar="NAME", help="these models or recipes")
    parser.add_argument("--force", action="store_true", help="build also what is there")
    options = parser.parse_args(arguments)
    models: Path = options.models.resolve()
    references: Path = (options.reference or models.parent / "reference").resolve()
    console = Console()
    begin = time.monotonic()
    outcomes = prepare(models, references, console, only=options.only, is_forced=options.force)
    console.print(f"{models} is ready in {time.monotonic() - begin:.1f} s", highlight=False)
    return 1 if any(outcome.state == "failed" for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
