"""Which thread has a core that several threads of this process want at the same time.

The kernel shares a core fairly, and looks whose turn it is when a thread wakes and at its tick, every 4 ms on many
systems. A thread that has just run and wakes again, as an I/O thread does for the answer of the request that it took
in, has to let the others catch up first; nobody looks at the moment when they have, so it waits for the tick. What
loads a model, or reads the registry, is felt that way by every request. So I/O threads and instances ask for slices
so short that they go before whoever computes for long, as far as that is fair; with precedence I/O threads run at
the lowest real-time priority, fair or not.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading
from typing import Final

from aiorch_server.errors import InvalidSettings

#: The shortest that the kernel takes.
SLICE_US: Final = 100
#: Numbers of sched_setattr and sched_getattr, for which C libraries have no function of their own.
_CALLS: Final = {"x86_64": (314, 315), "aarch64": (274, 275), "riscv64": (274, 275)}
#: size, policy, flags, nice, priority, runtime, deadline, period: struct sched_attr of sched_setattr(2).
_ATTRIBUTES: Final = struct.Struct("=IIQiIQQQ")
_PRIORITY: Final = 1


def check_precedence() -> None:
    """Raises InvalidSettings where this process may not give precedence to its threads, with what it lacks."""
    refusal: list[OSError | AttributeError] = []

    def probe() -> None:
        try:
            give_precedence(threading.get_native_id())
        except (OSError, AttributeError) as error:
            refusal.append(error)

    thread = threading.Thread(target=probe, name="precedence")  # a thread cannot go back by itself everywhere
    thread.start()
    thread.join()
    if refusal:
        raise InvalidSettings(
            f"execution.scheduling: found realtime, which the system refuses ({_describe(refusal[0])}); it needs Linux "
            "with the capability CAP_SYS_NICE or a limit on real-time priority of at least 1 (ulimit -r; systemd: "
            "LimitRTPRIO=1), and a control group that may run real-time threads; otherwise write plain"
        )


def _describe(error: OSError | AttributeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else "there is no such call"


def give_precedence(thread_id: int) -> None:
    """The thread of this process runs whenever it can, before all that have no precedence; OSError where it may not.

    Only for threads that never wait for others of this process, and give the core away after each piece of work.
    """
    # Threads that have the same priority take turns; what they start has none.
    policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
    os.sched_setscheduler(thread_id, policy, os.sched_param(_PRIORITY))


def ask_short_slices(thread_id: int = 0) -> bool:
    """That thread, 0: the calling one, goes before those with longer slices, for its fair share of the core.

    Gives whether the kernel took it; nothing else changes where it did not.

    A slice is ``sched_runtime`` of an ordinary thread since Linux 6.12 (EEVDF; sched_setattr(2)), and ignored before.
    """
    calls = _CALLS.get(platform.machine())
    if os.name != "posix" or platform.system() != "Linux" or calls is None:
        return False
    setattr_call, getattr_call = calls
    system = ctypes.CDLL(None).syscall
    found = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if system(getattr_call, thread_id, found, _ATTRIBUTES.size, 0):
        return False
    size, kind, _, nice, priority, *_ = _ATTRIBUTES.unpack(found.raw)
    if kind != os.SCHED_OTHER:
        return False
    wanted = _ATTRIBUTES.pack(size, kind, 0, nice, priority, SLICE_US * 1000, 0, 0)
    if system(setattr_call, thread_id, wanted, 0) or system(getattr_call, thread_id, found, _ATTRIBUTES.size, 0):
        return False
    return bool(_ATTRIBUTES.unpack(found.raw)[5] == SLICE_US * 1000)
