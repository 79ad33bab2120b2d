"""Models and versions, blocking."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from aiorch_client.admin import push, registry_calls
from aiorch_client.admin.connection import AdminConnection
from aiorch_client.admin.types import Model, ModelVersion, Provenance, Upload


class RegistryMethods(AdminConnection):
    """The calls of the service ModelRegistry."""

    def register_model(
        self,
        name: str,
        *,
        description: str = "",
        labels: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Model:
        """Makes a model that has no versions yet."""
        return self._call(registry_calls.register_model(name, description, labels or {}), timeout_s)

    def get_model(self, name: str, *, timeout_s: float | None = None) -> Model:
        """One model; NotFoundError."""
        return self._call(registry_calls.get_model(name), timeout_s)

    def update_model(
        self,
        name: str,
        *,
        description: str | None = None,
        labels: Mapping[str, str] | None = None,
        etag: str = "",
        timeout_s: float | None = None,
    ) -> Model:
        """Changes what is not None; with ``etag`` only a model that is still the one which had it."""
        return self._call(registry_calls.update_model(name, description, labels, etag), timeout_s)

    def list_models(self, prefix: str = "", *, timeout_s: float | None = None) -> Iterator[Model]:
        """All models whose names begin so, by name; asks for page after page, each within ``timeout_s``."""
        return self._list(registry_calls.list_models(prefix), timeout_s)

    def delete_model(self, name: str, *, timeout_s: float | None = None) -> None:
        """Takes a model away that has neither versions nor a deployment."""
        self._call(registry_calls.delete_model(name), timeout_s)

    def get_version(
        self, model: str, version: int = 0, *, alias: str = "", timeout_s: float | None = None
    ) -> ModelVersion:
        """One version by number or alias; neither: the latest."""
        return self._call(registry_calls.get_version(model, version, alias), timeout_s)

    def list_versions(self, model: str, *, timeout_s: float | None = None) -> Iterator[ModelVersion]:
        """All versions of a model, the highest first."""
        return self._list(registry_calls.list_versions(model), timeout_s)

    def delete_version(self, model: str, version: int, *, timeout_s: float | None = None) -> None:
        """Takes a version away that no alias points to and no deployment uses."""
        self._call(registry_calls.delete_version(model, version), timeout_s)

    def set_alias(
        self, model: str, alias: str, version: int, *, expected_version: int = 0, timeout_s: float | None = None
    ) -> Model:
        """Points ``alias`` at ``version``, 0 takes it away; if ``expected_version``, only from there."""
        return self._call(registry_calls.set_alias(model, alias, version, expected_version), timeout_s)

    def push(
        self,
        model: str,
        path: str | os.PathLike[str],
        *,
        aliases: Sequence[str] = (),
        provenance: Provenance | None = None,
        is_origin_looked_up: bool = True,
        create_model: bool = True,
        upload_id: str = "",
        progress: push.Progress | None = None,
        timeout_s: float | None = None,
    ) -> ModelVersion:
        """Uploads a folder, a file or an archive as a new version, and returns when that is whole and verified.

        The files are read twice, for the checksum and to send them, and never held in memory; ``archive.open_archive``
        tells what becomes of which. With ``is_origin_looked_up`` the framework and the git commit are filled in where
        ``provenance`` has none. A cut connection is made anew and what came is not sent again; a ``upload_id`` of the
        caller's choice goes on with an upload of the same files that an earlier call began. ``progress`` is called from
        another thread with the bytes sent and those of all. ``timeout_s`` is for the whole, None: a day.
        """
        package = push.prepare(
            model,
            os.fspath(path),
            aliases=aliases,
            provenance=provenance,
            is_origin_looked_up=is_origin_looked_up,
            create_model=create_model,
            upload_id=upload_id,
        )
        steps = push.upload(self._layer, package, progress, timeout_s, is_continued=bool(upload_id))
        return self._run(steps)

    def get_upload(self, model: str, upload_id: str, *, timeout_s: float | None = None) -> Upload:
        """How far an upload is; NotFoundError."""
        return self._call(registry_calls.get_upload(model, upload_id), timeout_s)
