"""Names in archives: which ones may become a version's paths, and which of them cannot stand beside each other."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from aiorch_server.config.names import check_name, parse_version
from aiorch_server.errors import PayloadTooLarge, RequestError

_DRIVE = re.compile(r"[A-Za-z]:")
_LONGEST_SHOWN = 120
#: The version's folder where an archive holds a whole model folder, whatever number it had there.
VERSION_FOLDER = "1"


def show(name: str) -> str:
    """``name`` for an error's text: quoted, without characters that do not print, and of bounded length."""
    shown = name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}..."
    return ascii(shown)


def check_path(name: str, *, longest_bytes: int, deepest: int) -> str:
    """The path that a name in an archive stands for, "" for the archive's root; RequestError says what is wrong."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise RequestError(f"the archive holds {show(name)}, which is not UTF-8") from None
    if length > longest_bytes:
        raise PayloadTooLarge(f"the archive holds {show(name)}: a path may have {longest_bytes} bytes, it has {length}")
    if name.startswith("/") or _DRIVE.match(name):
        raise RequestError(f"the archive holds {show(name)}: paths must be relative")
    while name.startswith("./"):
        name = name[2:]
    if name in ("", "."):
        return ""
    segments = name.split("/")
    if len(segments) > deepest:
        raise PayloadTooLarge(f"the archive holds {show(name)}: paths may be {deepest} deep, it is {len(segments)}")
    for segment in segments:
        if segment == "..":
            raise RequestError(f"the archive holds {show(name)}, which leads out of it")
        if segment == "__pycache__":
            raise RequestError(f"the archive holds {show(name)}; leave compiled Python code out")
        try:
            check_name(segment)
        except ValueError as error:
            raise RequestError(f"the archive holds {show(name)}: {error}") from None
    return name


class Paths:
    """The files and folders seen so far; refuses what a disk could not hold side by side, on any system."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, bool]] = {}

    def add(self, path: str, *, is_folder: bool) -> None:
        """RequestError where ``path`` is there already, differs by case alone, or is both a file and a folder."""
        segments = path.split("/")
        for depth in range(1, len(segments)):
            self._note("/".join(segments[:depth]), is_folder=True)
        self._note(path, is_folder=is_folder)

    def _note(self, path: str, *, is_folder: bool) -> None:
        # two spellings of one letter are one name on some systems, as are capitals and small letters
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
        known = self._seen.get(key)
        if known is None:
            self._seen[key] = (path, is_folder)
            return
        former, was_folder = known
        if former != path:
            raise RequestError(f"the archive holds both {show(former)} and {show(path)}, which differ by case alone")
        if was_folder != is_folder:
            raise RequestError(f"the archive holds {show(path)} both as a file and as a folder")
        if not is_folder:
            raise RequestError(f"the archive holds {show(path)} twice")


def find_version_folder(paths: Iterable[str]) -> str:
    """The name of the one version's folder at the root, "" where there is none; RequestError for several."""
    listed = list(paths)
    for path in listed:
        if _is_version(path):
            raise RequestError(f"the archive holds the file {show(path)}, a name that is kept for a version's folder")
    found = sorted(
        {root for root, separator, _ in (path.partition("/") for path in listed) if separator and _is_version(root)}
    )
    if len(found) > 1:
        raise RequestError(f"the archive holds the versions {', '.join(found[:8])}; a version is uploaded alone")
    return found[0] if found else ""


def _is_version(name: str) -> bool:
    return parse_version(name) is not None
