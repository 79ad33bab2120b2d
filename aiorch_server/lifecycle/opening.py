"""From what the repository holds of a model, or a request brings, to the versions that are to serve."""

from __future__ import annotations

from collections.abc import Mapping

from aiorch_server.errors import BackendError, ModelLoadError, OverrideRefused, RequestError, UnknownModel
from aiorch_server.lifecycle.model import ManagedModel
from aiorch_server.lifecycle.refusals import UNKNOWN_LOAD_TEXT, explain_missing_versions
from aiorch_server.lifecycle.threads import run_blocking
from aiorch_server.lifecycle.version_policy import choose_aspired, find_missing
from aiorch_server.repository import ModelRepository, ModelSnapshot, RepositoryModel


class Opener:
    """For the event loop's thread."""

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository
        self._overrides = 0

    async def open(
        self,
        model: ManagedModel,
        config_json: str | bytes | None,
        files: Mapping[str, bytes],
        snapshot: ModelSnapshot | None,
        *,
        is_asked: bool,
    ) -> tuple[RepositoryModel, dict[int, str]]:
        """The model as the repository holds it now, and the fingerprint of each version that it wants served.

        ``snapshot`` is what was seen of it last. Raises as LifecycleManager.load; what is there no
        more is unloaded.
        """
        name = model.name
        # Whatever comes of it: only what changes after this look is tried again by itself.
        model.seen = snapshot if config_json is None else None
        try:
            opened = await run_blocking(
                f"open {name}", lambda: self._repository.open(name, config_json, files), discard=RepositoryModel.close
            )
        except UnknownModel:
            raise BackendError(UNKNOWN_LOAD_TEXT.format(name)) from None
        except (ModelLoadError, RequestError) as error:
            if config_json is not None:
                text = f"failed to load '{name}', failed to poll from model repository: {error}"
                raise OverrideRefused(text) from error
            if isinstance(error, RequestError):
                raise
            raise ModelLoadError(f"load failed for model '{name}': {error}") from error
        snapshot, policy = opened.snapshot, opened.config.version_policy
        prefix = snapshot.fingerprint
        if config_json is None:
            model.seen = snapshot
        else:
            # Unlike anything in the repository, so that a later plain load goes back to what is stored.
            self._overrides += 1
            prefix = f"override {self._overrides}: {prefix}"
        aspired = {v: f"{prefix}/{snapshot.versions[v]}" for v in choose_aspired(policy, snapshot.versions)}
        if not aspired:
            await run_blocking(f"close {name}", opened.close)
            if not is_asked and not snapshot.versions:  # all versions were removed; a wrong policy removes nothing
                await model.unload()
            raise ModelLoadError(explain_missing_versions(name, find_missing(policy, snapshot.versions)))
        return opened, aspired
