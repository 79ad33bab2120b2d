"""Where a version's files go in a model's folder, and what does not belong there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from aiorch_server.registry.paths import VERSION_FOLDER
from aiorch_server.registry.records import ArtefactFile, Manifest

_PREFIX = f"{VERSION_FOLDER}/"


class Layout:
    """The places of one version's files, relative to the model's folder.

    Of an archive that held a model's folder: as they were, with the version's own number for its folder. Of others: all
    in the version's folder, with a link to each beside it, so that what belongs to the model (configuration, labels,
    samples for warm-up) is found there too.
    """

    def __init__(self, model: str, version: int, manifest: Manifest) -> None:
        self.model = model
        self.version = version
        self.manifest = manifest
        self._is_folder = any(file.path.startswith(_PREFIX) for file in manifest.files)

    def place(self, file: ArtefactFile) -> str:
        """Where one file is."""
        if not self._is_folder:
            return f"{self.version}/{file.path}"
        if file.path.startswith(_PREFIX):
            return f"{self.version}/{file.path.removeprefix(_PREFIX)}"
        return file.path

    def make_folders(self, directory: Path) -> None:
        """Everything but the files: folders and links."""
        (directory / str(self.version)).mkdir(parents=True)
        for file in self.manifest.files:
            (directory / self.place(file)).parent.mkdir(parents=True, exist_ok=True)
        for link, target in self._links().items():
            (directory / link).symlink_to(target)

    def find_strangers(self, directory: Path) -> list[str]:
        """What is there and should not be, and links that are missing; byte code that Python left is removed."""
        files = {self.place(file) for file in self.manifest.files}
        folders = {parent for file in files for parent in _list_parents(file)} | {str(self.version)}
        links, found = self._links(), []
        for current, names, others in os.walk(directory):
            for name in (*names, *others):
                path = Path(current, name)
                relative = path.relative_to(directory).as_posix()
                if path.is_symlink():
                    if links.pop(relative, "") != str(path.readlink()):
                        found.append(relative)
                elif name == "__pycache__" and path.is_dir():
                    # it would be run in place of the source beside it
                    shutil.rmtree(path)
                    names.remove(name)
                elif relative not in (folders if path.is_dir() else files):
                    found.append(relative)
        return [*found, *links]

    def _links(self) -> dict[str, str]:
        if self._is_folder:
            return {}
        roots = {file.path.partition("/")[0] for file in self.manifest.files}
        return {root: f"{self.version}/{root}" for root in sorted(roots)}


def _list_parents(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path
