"""Listening sockets from the addresses that gRPC's users write."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Final

_BACKLOG: Final = 1024
_UNIX_NAME_BYTES: Final = 107  # of sun_path's 108: a path ends with a zero, an abstract name begins with one


def bind_sockets(address: str, count: int = 1, *, is_shared: bool = False) -> tuple[list[socket.socket], int]:
    """Listening sockets for ``host:port``, ``[v6]:port``, ``unix:path`` or ``unix-abstract:name``, and their port.

    The kernel spreads connections over the ``count`` sockets of a TCP port (SO_REUSEPORT); of a unix socket, whose
    port is 1, there is one alone. Port 0 takes a free one; ``[::]`` listens on IPv4 too. With ``is_shared`` other
    processes of this user that say the same may listen on the same TCP port; otherwise one that is taken is refused.
    (A port with a ``count`` above 1 cannot keep out a later process of this user that asks to share it.) Raises
    RuntimeError, as grpc.aio does, and says why.
    """
    try:
        if address.startswith("unix-abstract:"):
            return [_bind_abstract(address.removeprefix("unix-abstract:"))], 1
        if address.startswith("unix:"):
            return [_bind_unix(Path(address.removeprefix("unix:").removeprefix("//")))], 1
        return _bind_tcp(*_split(address), count, is_shared)
    except (OSError, ValueError) as error:
        raise RuntimeError(f"Failed to bind to address {address}: {error}") from error


def remove_socket_file(bound: socket.socket) -> None:
    """Takes the file of a unix socket away; nothing for others."""
    if bound.family == socket.AF_UNIX and isinstance(name := bound.getsockname(), str):  # an abstract one is bytes
        with contextlib.suppress(OSError):
            Path(name).unlink()


def _split(address: str) -> tuple[str, int]:
    for prefix in ("ipv4:", "ipv6:", "dns:///"):
        address = address.removeprefix(prefix)
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError("expected host:port with a port of 0 to 65535")
    if host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("[")):
        raise ValueError("an IPv6 address goes in brackets, for example [::1]:8001")
    return host.strip("[]"), int(port)


def _bind_tcp(host: str, port: int, count: int, is_shared: bool) -> tuple[list[socket.socket], int]:
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
            if index == 0 and not is_shared:
                # Shared only once it is ours: another server of this user on the port is refused, not joined.
                bound.bind(sockaddr)
            if count > 1 or is_shared:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if index > 0 or is_shared:
                bound.bind(sockaddr if index == 0 else sockets[0].getsockname())
        for bound in sockets:
            bound.listen(_BACKLOG)
            bound.setblocking(False)
    except BaseException:
        for bound in sockets:
            bound.close()
        raise
    return sockets, int(sockets[0].getsockname()[1])


def _bind_abstract(name: str) -> socket.socket:
    if not name:
        raise ValueError("expected a name behind unix-abstract:")
    return _listen_unix("\0" + name)


def _bind_unix(path: Path) -> socket.socket:
    if path.is_dir():
        raise ValueError("this is a folder; expected the path of a socket in it")
    if not path.parent.is_dir():
        raise ValueError(f"the folder {path.parent} does not exist")
    if path.exists() and not path.is_socket():
        raise ValueError("there is a file that is no socket; it is left alone")
    if _is_abandoned(path):
        path.unlink()
    return _listen_unix(str(path))


def _listen_unix(name: str) -> socket.socket:
    if (size := len(os.fsencode(name.removeprefix("\0")))) > _UNIX_NAME_BYTES:
        raise ValueError(f"the name has {size} bytes; a unix socket's ends at {_UNIX_NAME_BYTES}")
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bound.bind(os.fsencode(name))
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except BaseException:
        bound.close()
        raise
    return bound


def _is_abandoned(path: Path) -> bool:
    """Whether a socket file is left over from a server that is gone: nobody accepts."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False
