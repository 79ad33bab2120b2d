"""Files that came with a load request, written to a private temporary folder in the repository's layout."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

from aiorch_server.config.names import check_name, parse_version
from aiorch_server.errors import InternalError, RequestError

MOST_FILES = 1000
_DEEPEST_PATH = 16
_LONGEST_SHOWN = 200


class Overlay:
    """A temporary model folder, readable by this user only.

    Owned: ``close`` removes it; so does the end of the object or of the process, should nobody have closed it.
    """

    def __init__(self, name: str, files: Mapping[str, bytes]) -> None:
        """Writes ``files`` (``<version>/<path>`` -> content) below a new folder ``<temporary>/<name>``.

        Raises RequestError for a path that is not allowed, before anything is written; InternalError if the
        temporary folder cannot be written.
        """
        placed = {_check_path(path): content for path, content in files.items()}
        if not placed or len(placed) > MOST_FILES:
            raise RequestError(f"a load request may bring 1 to {MOST_FILES} files, got {len(placed)}")
        for path in placed:
            if any(parent in placed for parent in path.parents):
                raise RequestError(f"file '{path}' lies below another file of the same load request")
        try:
            base = Path(tempfile.mkdtemp(prefix="aiorch-overlay-"))
            self._finalizer = weakref.finalize(self, shutil.rmtree, base, ignore_errors=True)
            self.directory = base.resolve() / name
            for path, content in placed.items():
                target = self.directory / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        except OSError as error:
            self.close()
            raise InternalError(f"files of model '{name}' cannot be stored: {error.strerror}") from None

    def close(self) -> None:
        """Removes the folder; may be called again."""
        finalizer = getattr(self, "_finalizer", None)
        if finalizer is not None:
            finalizer()


def _check_path(path: str) -> Path:
    segments = path.removeprefix("file:").split("/")
    # the text stays in the model's index and in the log, and the client chose its length
    shown = path if len(path) <= _LONGEST_SHOWN else f"{path[:_LONGEST_SHOWN]}..."
    if len(segments) < 2 or len(segments) > _DEEPEST_PATH or parse_version(segments[0]) is None:
        raise RequestError(f"file '{shown}' must be named <version>/<file name>, with a version above 0")
    try:
        return Path(*map(check_name, segments))
    except ValueError as error:
        raise RequestError(f"file '{shown}' cannot be stored: {error}") from None
