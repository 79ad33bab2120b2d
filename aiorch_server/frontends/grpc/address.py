"""Listening sockets from the addresses that gRPC's users write."""

from __future__ import annotations

import contextlib
import socket
import stat
from pathlib import Path
from typing import Final

_BACKLOG: Final = 1024


def bind_sockets(address: str, count: int = 1) -> tuple[list[socket.socket], int]:
    """Listening sockets for ``host:port``, ``[v6]:port`` or ``unix:path``, and their port (1 for a unix socket).

    The kernel spreads connections over the ``count`` sockets of a TCP port (SO_REUSEPORT); of a unix socket there is
    one alone. Port 0 takes a free one; ``[::]`` listens on IPv4 too. Raises RuntimeError, as grpc.aio does, and says
    why.
    """
    try:
        if address.startswith("unix:"):
            return [_bind_unix(Path(address.removeprefix("unix:").removeprefix("//")))], 1
        return _bind_tcp(*_split(address), count)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"Failed to bind to address {address}: {error}") from error


def remove_socket_file(bound: socket.socket) -> None:
    """Takes the file of a unix socket away; nothing for others."""
    if bound.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            Path(bound.getsockname()).unlink()


def _split(address: str) -> tuple[str, int]:
    for prefix in ("ipv4:", "ipv6:", "dns:///"):
        address = address.removeprefix(prefix)
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError("expected host:port with a port of 0 to 65535")
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ValueError("an IPv6 address goes in brackets, for example [::1]:8001")
    return host.strip("[]"), int(port)


def _bind_tcp(host: str, port: int, count: int) -> tuple[list[socket.socket], int]:
    family, kind, protocol, _, sockaddr = socket.getaddrinfo(
        host if host not in ("", "*") else "::", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sockets: list[socket.socket] = []
    try:
        for index in range(count):
            bound = socket.socket(family, kind, protocol)
            sockets.append(bound)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host in ("", "*", "::") else 1)
            if index == 0:
                # Shared only once it is ours: another server of this user on the port is refused, not joined.
                bound.bind(sockaddr)
            if count > 1:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if index > 0:
                bound.bind(sockets[0].getsockname())
        for bound in sockets:
            bound.listen(_BACKLOG)
            bound.setblocking(False)
    except BaseException:
        for bound in sockets:
            bound.close()
        raise
    return sockets, int(sockets[0].getsockname()[1])


def _bind_unix(path: Path) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_abandoned(path):
            path.unlink()
        bound.bind(str(path))
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except BaseException:
        bound.close()
        raise
    return bound


def _is_abandoned(path: Path) -> bool:
    """Whether a socket file is left over from a server that is gone: nobody accepts."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False
