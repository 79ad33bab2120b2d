"""PEM files of a secure port, followed while it serves: who renews certificates replaces the files."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiorch_server.frontends.grpc.credentials import ServerCredentials

logger = logging.getLogger(__name__)

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
        """What the files hold now; OSError when one cannot be read."""
        return ServerCredentials(
            private_key=self.key.read_bytes(),
            certificate_chain=self.certificate.read_bytes(),
            root_certificates=self.root.read_bytes() if self.root is not None else None,
            require_client_auth=self.require_client_auth,
        )

    def stamp(self) -> tuple[_Stamp | None, ...]:
        """Differs when a file was written or replaced; None for one that is not there."""
        return tuple(_stamp(path) for path in (self.certificate, self.key, self.root) if path is not None)

    async def follow(
        self, seen: tuple[_Stamp | None, ...], renew: Callable[[ServerCredentials], None], interval_s: float
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
            except (OSError, ValueError) as error:
                logger.error(
                    "the files of gRPC's TLS have changed and cannot be used, the old ones stay in force: %s", error
                )
            else:
                logger.info("new connections get the certificate that is in %s now", self.certificate)


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
