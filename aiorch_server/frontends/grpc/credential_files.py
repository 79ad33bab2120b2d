"""PEM files of a secure port, followed while it serves: who renews certificates replaces the files."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiorch_server.frontends.grpc.credentials import ServerCredentials

logger = logging.getLogger(__name__)

#: Ten times what all public authorities need together.
_MAX_FILE_BYTES: Final = 4 << 20
#: What tells a file's state: when it was written, its size, and which file it is.
_Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class CredentialFiles:
    """Where the credentials of a port are; ``root`` None where clients' certificates are not checked."""

    certificate: Path
    key: Path
    root: Path | None = None
    require_client_auth: bool = False

    def read(self) -> ServerCredentials:
        """What the files hold now; OSError when one cannot be read, ValueError when it is too large."""
        return ServerCredentials(
            private_key=_read(self.key),
            certificate_chain=_read(self.certificate),
            root_certificates=_read(self.root) if self.root is not None else None,
            require_client_auth=self.require_client_auth,
        )

    def stamp(self) -> tuple[_Stamp | None, ...]:
        """Differs when a file was written or replaced; None for one that is not there."""
        return tuple(_stamp(path) for path in (self.certificate, self.key, self.root) if path is not None)

    async def follow(
        self,
        seen: tuple[_Stamp | None, ...],
        renew: Callable[[ServerCredentials], None],
        interval_s: float,
        door: str = "gRPC",
    ) -> None:
        """Hands ``renew`` what the files hold whenever their stamp is not the one ``seen`` last; until cancelled.

        Files that cannot be used are named in the log once, and nothing changes: key and certificate are replaced one
        after the other, and fit again at the next look. Files are read on a thread.
        """
        while True:
            await asyncio.sleep(interval_s)
            found = await asyncio.to_thread(self.stamp)
            if found == seen:
                continue
            seen = found  # from before it is read: what is written meanwhile is seen at the next look
            try:
                renew(await asyncio.to_thread(self.read))
            except Exception as error:  # of whatever kind: the next files may be right again
                logger.error(
                    "the files of %s's TLS (%s) have changed and cannot be used, the old ones stay in force: %s",
                    door,
                    ", ".join(str(path) for path in (self.certificate, self.key, self.root) if path is not None),
                    error,
                )
            else:
                logger.info("new connections get the certificate that is in %s now", self.certificate)


def _read(path: Path) -> bytes:
    # A pipe without a writer, which open() would wait for, is empty; a device that never ends is too large.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        os.set_blocking(file.fileno(), True)
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError(f"{path} has more than {_MAX_FILE_BYTES} bytes, which no PEM file needs")
    return content


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
