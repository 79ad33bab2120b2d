"""What the registry calls a server: the same after a restart, and another for each that runs beside it.

Host and port do not tell containers apart that were given the same host name; what a server keeps on its disk does.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Final

from aiorch_server.registry.scratch import locked, telling

_FILE: Final = "server-id"
_LENGTH: Final = 8
_VALID: Final = re.compile(rf"[0-9a-f]{{{_LENGTH}}}")


def name_server(address: str, folder: Path) -> str:
    """``address`` and what tells this server from others of the same address, such as ``host:8001 3f0c91ab``.

    ``folder`` exists and is this server's own. StoreUnavailable where it cannot be read or written, CapacityError where
    it is full.
    """
    file = folder / _FILE
    with telling(f"cache folder {folder}", doing="writing this server's name"), locked(folder / f"{_FILE}.lock"):
        found = file.read_text(encoding="ascii", errors="replace").strip() if file.exists() else ""
        if not _VALID.fullmatch(found):  # none yet, or cut off by a crash
            found = secrets.token_hex(_LENGTH // 2)
            file.write_text(f"{found}\n", encoding="ascii")
    return f"{address} {found}"
