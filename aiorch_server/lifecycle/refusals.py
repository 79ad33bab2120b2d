"""The words with which requests for models and versions are refused, which are Triton's (WIRE 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from aiorch_server.errors import AiorchError, ModelNotReady, RequestError, UnknownModel, UnknownVersion
from aiorch_server.lifecycle.model import ManagedModel
from aiorch_server.lifecycle.route import Route

UNKNOWN_LOAD_TEXT: Final = "failed to load '{}', failed to poll from model repository"
UNKNOWN_UNLOAD_TEXT: Final = "failed to unload '{}', it is neither loaded nor in the model repository"
_MAX_VERSION_DIGITS: Final = 18


def parse_version(text: str) -> int:
    """The version that a request names: 0 for "" (the policy's choice). RequestError for what is no number > 0."""
    if not text:
        return 0
    if text.isascii() and text.isdecimal() and len(text) <= _MAX_VERSION_DIGITS and int(text) > 0:
        return int(text)
    detail = "not within range" if text.isascii() and text.isdecimal() else "not a positive whole number"
    raise RequestError(
        f"failed to get model version from specified version string '{text[:100]}' (details: {detail}), version should "
        "be an integral value > 0"
    )


def explain_missing(name: str, version: int, model: ManagedModel | None, route: Route | None) -> AiorchError:
    """Why there is no version to run on, 0: none at all."""
    text = f"Request for unknown model: '{name}'"
    if model is None or not (model.versions or model.offered):
        return explain_unknown(name)
    if not version:
        if route is not None:
            return ModelNotReady(f"{text} version {', '.join(map(str, route.wanted))} is not at ready state")
        return UnknownVersion(f"{text} has no available versions")
    if version not in model.versions:
        return UnknownVersion(f"{text} version {version} is not found")
    return ModelNotReady(f"{text} version {version} is not at ready state")


def explain_unknown(name: str) -> UnknownModel:
    """No model of that name."""
    return UnknownModel(f"Request for unknown model: '{name}' is not found")


def explain_missing_versions(name: str, missing: Sequence[int]) -> str:
    """No version that the policy asks for."""
    if missing:
        wanted = ", ".join(map(str, missing))
        return f"load failed for model '{name}': version_policy asks for version {wanted}, which is not there"
    text = f"load failed for model '{name}': it has no version folder (a folder named 1, 2, ...)"
    return (
        f"{text}; if it is a version itself, the repository is the folder above its model" if name.isdecimal() else text
    )
