"""Compiles the targets against the core's headers; run by ``run.py`` in the folder that will hold them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

FLAGS = shlex.split(os.environ["AIORCH_FUZZ_FLAGS"])

setup(
    name="fuzz-targets",
    packages=[],
    ext_modules=cythonize(
        [
            Extension(
                source.stem,
                [str(source)],
                extra_compile_args=["-g", "-O1", "-std=gnu11", "-Wno-unused-function", *FLAGS],
                extra_link_args=FLAGS,
            )
            for source in sorted(Path("targets").glob("*.pyx"))
        ],
        include_path=[os.environ["AIORCH_FUZZ_HEADERS"]],
        compiler_directives={"language_level": 3, "wraparound": False, "cdivision": True, "boundscheck": False},
    ),
)
