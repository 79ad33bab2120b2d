"""Where an issuer's keys come from: a file, an address, or the address that the issuer's own description names.

Descriptions as in OpenID Connect Discovery 1.0 (section 4) and RFC 8414. All functions block and are for a thread.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

MAX_BYTES: Final = 256 * 1024
_CHUNK_BYTES: Final = 16 * 1024
_LOOPBACKS: Final = frozenset({"127.0.0.1", "::1", "localhost"})


def read_file(path: Path) -> bytes:
    """The content of a file of at most MAX_BYTES; OSError, ValueError."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    return _bound(content)


class _Line:
    """The connection of one fetch, which another thread may cut."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self.is_cut = False

    def connect(self, *arguments: Any, **more: Any) -> socket.socket:
        """As ``socket.create_connection``."""
        made = socket.create_connection(*arguments, **more)
        with self._lock:
            # One of its own: TLS takes the other over, from the handshake on.
            self._sockets.append(made.dup())
            if self.is_cut:
                made.close()
                raise TimeoutError
        return made

    def cut(self) -> None:
        """From now on nothing more comes."""
        with self._lock:
            self.is_cut = True
            for each in self._sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the descriptors back."""
        with self._lock:
            for each in self._sockets:
                each.close()
            self._sockets.clear()

    def put_under(self, connection: Any) -> Any:
        """``connection`` of http.client, which will use this line."""
        connection._create_connection = self.connect
        return connection


class _HttpHandler(urllib.request.HTTPHandler):
    def __init__(self, line: _Line) -> None:
        super().__init__()
        self._line = line

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(lambda *a, **k: self._line.put_under(http.client.HTTPConnection(*a, **k)), request)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def __init__(self, context: ssl.SSLContext, line: _Line) -> None:
        super().__init__(context=context)
        self._line, self._tls = line, context

    def https_open(self, request: urllib.request.Request) -> Any:
        def connect(*a: Any, **k: Any) -> Any:
            return self._line.put_under(http.client.HTTPSConnection(*a, context=self._tls, **k))

        return self.do_open(connect, request)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Keys come from where the settings say, and from nowhere else."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def make_fetch(url: str, *, timeout_s: float, tls_root: Path | None = None) -> Callable[[], bytes]:
    """What gets the document at ``url``; it raises OSError or ValueError, soon after ``timeout_s``.

    Only https, or http on this machine; no redirects; at most MAX_BYTES.
    """
    context = ssl.create_default_context(cafile=tls_root)

    def fetch() -> bytes:
        line = _Line()
        https = _HttpsHandler(context, line)
        opener = urllib.request.build_opener(_HttpHandler(line), https, _NoRedirects())
        # The opener's timeout is for one read: who sends a byte now and then would never be done.
        clock = threading.Timer(timeout_s, line.cut)
        clock.daemon = True
        clock.start()
        try:
            content = get(opener)
            if line.is_cut:  # what had come looks like all there is
                raise TimeoutError
            return content
        except (OSError, http.client.HTTPException) as error:
            if line.is_cut:
                raise TimeoutError(f"it did not come within {timeout_s:g} s") from None
            if isinstance(error, OSError):
                raise
            raise OSError(f"{url} does not speak HTTP: {type(error).__name__}") from None
        finally:
            clock.cancel()
            line.close()

    def get(opener: urllib.request.OpenerDirector) -> bytes:
        parts = urlsplit(url)
        if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOOPBACKS):
            raise ValueError(f"its address {url} is not https")
        request = urllib.request.Request(url, headers={"accept": "application/json"})
        until = time.monotonic() + timeout_s
        content = b""
        try:
            with opener.open(request, timeout=timeout_s) as answer:
                while chunk := answer.read1(_CHUNK_BYTES):
                    content += chunk
                    if len(content) > MAX_BYTES:
                        break
                    if time.monotonic() > until:
                        raise TimeoutError(f"it did not come within {timeout_s:g} s")
        except urllib.error.HTTPError as error:
            raise OSError(f"{url} answers with status {error.code}") from None
        except urllib.error.URLError as error:
            raise OSError(f"{url} cannot be reached: {error.reason}") from None
        return _bound(content)

    return fetch


def make_discovery(issuer: str, *, timeout_s: float, tls_root: Path | None = None) -> Callable[[], bytes]:
    """As ``make_fetch``, of the keys that the description of ``issuer`` names; ValueError if that is another's."""
    describe = make_fetch(
        f"{issuer.rstrip('/')}/.well-known/openid-configuration", timeout_s=timeout_s, tls_root=tls_root
    )

    def fetch() -> bytes:
        try:
            description = json.loads(describe())
        except RecursionError:
            raise ValueError("its description is no JSON") from None
        if not isinstance(description, dict) or description.get("issuer") != issuer:
            raise ValueError(f"its description is not that of {issuer}")
        address = description.get("jwks_uri")
        if not isinstance(address, str):
            raise ValueError("its description names no jwks_uri")
        return make_fetch(address, timeout_s=timeout_s, tls_root=tls_root)()

    return fetch


def _bound(content: bytes) -> bytes:
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return content
