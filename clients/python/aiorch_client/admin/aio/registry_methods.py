"""Models and versions, awaited."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence

from aiorch_client.admin import push, registry_calls
from aiorch_client.admin.aio.connection import AsyncAdminConnection
from aiorch_client.admin.types import Model, ModelVersion, Provenance, Upload


class AsyncRegistryMethods(AsyncAdminConnection):
    """The calls of the service ModelRegistry."""

    async def register_model(
        self,
        name: str,
        *,
        description: str = "",
        labels: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Model:
        """As ``AdminClient.register_model``."""
        return await self._call(registry_calls.register_model(name, description, labels or {}), timeout_s)

    async def get_model(self, name: str, *, timeout_s: float | None = None) -> Model:
        """As ``AdminClient.get_model``."""
        return await self._call(registry_calls.get_model(name), timeout_s)

    async def update_model(
        self,
        name: str,
        *,
        description: str | None = None,
        labels: Mapping[str, str] | None = None,
        etag: str = "",
        timeout_s: float | None = None,
    ) -> Model:
        """As ``AdminClient.update_model``."""
        return await self._call(registry_calls.update_model(name, description, labels, etag), timeout_s)

    def list_models(self, prefix: str = "", *, timeout_s: float | None = None) -> AsyncIterator[Model]:
        """As ``AdminClient.list_models``."""
        return self._list(registry_calls.list_models(prefix), timeout_s)

    async def delete_model(self, name: str, *, timeout_s: float | None = None) -> None:
        """As ``AdminClient.delete_model``."""
        await self._call(registry_calls.delete_model(name), timeout_s)

    async def get_version(
        self, model: str, version: int = 0, *, alias: str = "", timeout_s: float | None = None
    ) -> ModelVersion:
        """As ``AdminClient.get_version``."""
        return await self._call(registry_calls.get_version(model, version, alias), timeout_s)

    def list_versions(self, model: str, *, timeout_s: float | None = None) -> AsyncIterator[ModelVersion]:
        """As ``AdminClient.list_versions``."""
        return self._list(registry_calls.list_versions(model), timeout_s)

    async def delete_version(self, model: str, version: int, *, timeout_s: float | None = None) -> None:
        """As ``AdminClient.delete_version``."""
        await self._call(registry_calls.delete_version(model, version), timeout_s)

    async def set_alias(
        self, model: str, alias: str, version: int, *, expected_version: int = 0, timeout_s: float | None = None
    ) -> Model:
        """As ``AdminClient.set_alias``."""
        return await self._call(registry_calls.set_alias(model, alias, version, expected_version), timeout_s)

    async def push(
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
        """As ``AdminClient.push``."""
        package = await asyncio.to_thread(
            push.prepare,
            model,
            os.fspath(path),
            aliases=aliases,
            provenance=provenance,
            is_origin_looked_up=is_origin_looked_up,
            create_model=create_model,
            upload_id=upload_id,
        )
        steps = push.upload(self._layer, package, progress, timeout_s, is_continued=bool(upload_id))
        return await self._run(steps)

    async def get_upload(self, model: str, upload_id: str, *, timeout_s: float | None = None) -> Upload:
        """As ``AdminClient.get_upload``."""
        return await self._call(registry_calls.get_upload(model, upload_id), timeout_s)
