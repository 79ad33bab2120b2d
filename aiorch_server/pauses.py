"""Short rests of threads for whose work no request waits, so that those which answer requests get the core."""

from __future__ import annotations

import time
from typing import Final

#: With the kernel's timer slack (50 us) a rest takes about 75 us, in which several requests are answered.
_PAUSE_S: Final = 20e-6


def pause() -> None:
    """Leaves core and interpreter to others for a moment; between steps of some 100 us of work.

    Never with a lock that requests or the event loop may wait for. Who shares a core with threads that answer requests
    keeps it until the kernel's tick, up to 4 ms, unless it waits for something: the kernel looks whose turn it is then.
    Lower priorities would not do instead: a thread that holds the interpreter and is not let onto the core holds up all
    that need the interpreter.
    """
    time.sleep(_PAUSE_S)
