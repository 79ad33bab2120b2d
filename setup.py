"""Extensions, compiler directives, the package map and two switches; all metadata is in pyproject.toml.

``AIORCH_DEBUG=1`` turns on invariant checks and annotated HTML; ``AIORCH_SANITIZE=address``, ``thread`` or ``fuzzer``
builds for the tools that ``make test-sanitize`` and ``make fuzz`` run (the last needs ``CC=clang``).
Libraries are found by pkg-config. Without libnghttp2 (>= 1.52) the HTTP/2 modules are left out; the server then offers
only its ``--transport grpcio`` door and says so. Without OpenSSL (>= 3.0) the I/O threads have no TLS: the event loop
carries it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

CORE = Path("aiorch_server/_core")
SESSIONS = {"h2_ledger", "h2_stream", "h2_answer", "h2_life", "h2_request", "h2", "h2_landing", "h2_probe"}
BACKENDS = Path("backends")
NEEDS_NGHTTP2 = SESSIONS | {"call", "desk", "aio_call", "aio", "crossing", "io_plane", "io_connection", "io_loop", "io"}
NEEDS_OPENSSL = {"tls"}
DEBUG = os.environ.get("AIORCH_DEBUG", "") not in ("", "0")
SANITIZERS = {
    "": [],
    "1": ["-fsanitize=address,undefined"],
    "address": ["-fsanitize=address,undefined"],
    "thread": ["-fsanitize=thread"],
    # Cython's own code adds nothing to NULL, which clang tells
    "fuzzer": ["-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize=pointer-overflow"],
}
SANITIZE = SANITIZERS.get(os.environ.get("AIORCH_SANITIZE", ""))
if SANITIZE is None:
    sys.exit(f"AIORCH_SANITIZE must be one of {', '.join(filter(None, SANITIZERS))}, or nothing")

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "initializedcheck": DEBUG,
    "cdivision": True,
    "embedsignature": True,
    "warn.unused": True,
    "freethreading_compatible": False,
}


def find_library(wanted: str) -> tuple[list[str], list[str]] | None:
    """Compiler and linker arguments for a library, or None when it is not there."""
    try:
        output = subprocess.run(
            ["pkg-config", "--cflags", "--libs", wanted], check=True, capture_output=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    words = shlex.split(output)
    return [w for w in words if w.startswith("-I")], [w for w in words if not w.startswith("-I")]


def list_extensions() -> list[Extension]:
    """One extension per compiled module; those over libnghttp2 only where it was found."""
    nghttp2 = find_library("libnghttp2 >= 1.52")
    openssl = find_library("libssl >= 3.0 libcrypto >= 3.0") if nghttp2 is not None else None
    if nghttp2 is None:
        print("aiorch: libnghttp2 not found, building without the native gRPC door", file=sys.stderr)
    elif openssl is None:
        print("aiorch: OpenSSL 3 not found, building without TLS on the I/O threads", file=sys.stderr)
    compile_args = ["-O1", "-g"] if SANITIZE else ["-O2", "-g1"]
    compile_args += ["-std=gnu11", "-Wno-unused-function", "-fvisibility=hidden"]
    link_args: list[str] = []
    if SANITIZE:
        # signed overflow is an error of ours, even where Python's own flags let it wrap
        compile_args += [*SANITIZE, "-fno-omit-frame-pointer", "-fno-wrapv", "-fno-sanitize-recover=undefined"]
        link_args += SANITIZE
    extensions = []
    for source in [*sorted(CORE.glob("*.pyx")), *sorted(BACKENDS.glob("aiorch_backends/*/*.pyx"))]:
        name = source.relative_to(BACKENDS) if source.is_relative_to(BACKENDS) else source
        extra_compile, extra_link = list(compile_args), list(link_args)
        libraries = [nghttp2] if source.stem in NEEDS_NGHTTP2 else [openssl] if source.stem in NEEDS_OPENSSL else []
        if None in libraries:
            continue
        for found in filter(None, libraries):
            extra_compile += found[0]
            extra_link += found[1]
        extensions.append(
            Extension(
                ".".join(name.with_suffix("").parts),
                [str(source)],
                include_dirs=["aiorch_server/include"],
                extra_compile_args=extra_compile,
                extra_link_args=extra_link,
                define_macros=[("AIORCH_DEBUG", "1" if DEBUG else "0")],
            )
        )
    return extensions


setup(
    ext_modules=cythonize(
        list_extensions(), compiler_directives=DIRECTIVES, annotate=DEBUG, nthreads=os.cpu_count() or 1
    ),
    options={"build_ext": {"parallel": os.cpu_count() or 1}},
)
