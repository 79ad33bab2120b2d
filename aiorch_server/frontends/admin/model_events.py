"""What those who watch are told of models and their versions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiorch_server.frontends.admin.caller import Caller
from aiorch_server.registry.events import append_event

if TYPE_CHECKING:
    from aiorch_server.registry.session import Session


def tell(session: Session, kind: str, text: str, caller: Caller, model: str, version: int = 0) -> None:
    """Writes an event of a model down, as part of what this transaction does."""
    append_event(session, kind, text, actor=caller.name, model=model, version=version)


def tell_registered(session: Session, caller: Caller, model: str) -> None:
    """The event of a new model."""
    tell(session, "model.registered", f"model {model} was registered", caller, model)


def tell_alias(session: Session, caller: Caller, model: str, alias: str, version: int) -> None:
    """The event of an alias that was pointed at a version, or with version 0 taken away."""
    if version:
        tell(session, "alias.set", f"{model}@{alias} is version {version}", caller, model, version)
    else:
        tell(session, "alias.deleted", f"{model}@{alias} was taken away", caller, model)
