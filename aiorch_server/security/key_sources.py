"""Where an issuer's keys come from: a file, an address, or the address that the issuer's own description names.

Descriptions as in OpenID Connect Discovery 1.0 (section 4) and RFC 8414. All functions block and are for a thread.
"""

from __future__ import annotations

import json
import ssl
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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Keys come from where the settings say, and from nowhere else."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


def make_fetch(url: str, *, timeout_s: float, tls_root: Path | None = None) -> Callable[[], bytes]:
    """What gets the document at ``url``; it raises OSError or ValueError, within a few times ``timeout_s``.

    Only https, or http on this machine; no redirects; at most MAX_BYTES.
    """
    context = ssl.create_default_context(cafile=tls_root)
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _NoRedirects())

    def fetch() -> bytes:
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
