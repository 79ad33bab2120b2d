"""A page of a list as its response, no larger than what clients receive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from aiorch_server.registry.records import Page

Item = TypeVar("Item")
Response = TypeVar("Response")
#: gRPC clients take 4 MiB unless they are told otherwise.
MAX_PAGE_BYTES: Final = 3 << 20


def encode_page(response: Response, field: str, page: Page[Item], encode: Callable[[Item], Any]) -> Response:
    """``response`` with the page's items in ``field``, as many as MAX_PAGE_BYTES hold, one at least, and the token."""
    messages: Any = getattr(response, field)
    size_bytes, token = 0, page.token
    for count, item in enumerate(page.items):
        message = encode(item)
        size_bytes += message.ByteSize()
        if count and size_bytes > MAX_PAGE_BYTES:
            token = page.token_after(count)
            break
        messages.append(message)
    response.next_page_token = token  # type: ignore[attr-defined]
    return response
