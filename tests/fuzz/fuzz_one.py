"""Gives one target to libFuzzer, in the process that ``run.py`` prepares; its arguments are libFuzzer's.

fuzz_one.py LIBFUZZER TARGET ARGUMENT...
"""

from __future__ import annotations

import ctypes
import importlib
import sys

from compile_targets import MODULES


def main() -> None:
    fuzzer = ctypes.CDLL(sys.argv[1])
    name = sys.argv[2]
    address = importlib.import_module(MODULES[name]).TARGETS[name]
    arguments = sys.argv[3:]
    argv = (ctypes.c_char_p * (len(arguments) + 1))(*(argument.encode() for argument in arguments), None)
    argc = ctypes.c_int(len(arguments))
    pointer = ctypes.cast(argv, ctypes.POINTER(ctypes.c_char_p))
    fuzzer.LLVMFuzzerRunDriver(ctypes.byref(argc), ctypes.byref(pointer), ctypes.c_void_p(address))


if __name__ == "__main__":
    main()
