"""Runs inputs through a target once, on the build of the core that is on the path.

    replay.py TARGET FILE-OR-FOLDER...

A broken law ends the process, and the last line on standard output names the input.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from pathlib import Path

from compile_targets import MODULES


def main() -> None:
    name, paths = sys.argv[1], [Path(path) for path in sys.argv[2:]]
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    address = importlib.import_module(MODULES[name]).TARGETS[name]
    # PyDLL's kind: the targets that want the interpreter take it, the others need none
    run = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)(address)
    for file in files:
        print(file, flush=True)
        content = file.read_bytes()
        run(content, len(content))
    print(f"{len(files)} inputs", flush=True)


if __name__ == "__main__":
    main()
