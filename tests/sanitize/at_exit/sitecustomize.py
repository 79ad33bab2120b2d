"""Makes each process that ``tests/sanitize/run.py`` starts, those that tests start included, say what it found.

Leaks are looked for when the interpreter ends, while all that it still holds can be reached: later, at the sanitizer's
own moment, it has let go of half of its world, and everything there would look lost. And gcc's UBSan, beside ASan,
forgets where its reports should go.
"""

import atexit
import contextlib
import ctypes
import gc
import os


def _look_for_leaks() -> None:
    gc.collect()
    look = getattr(ctypes.CDLL(None), "__lsan_do_recoverable_leak_check", None)
    if look is not None:
        look()


# the first that is registered is the last that is called
atexit.register(_look_for_leaks)
if path := os.environ.get("AIORCH_UNDEFINED_LOG"):
    with contextlib.suppress(OSError):
        ctypes.CDLL("libubsan.so.1").__sanitizer_set_report_path(path.encode())
