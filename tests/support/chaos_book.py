"""What an operator was told has been done to one model: the registry must say the same, whatever was killed."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from aiorch_client.admin import Deployment, ModelVersion, Rollout

MODEL = """
class Model:
    inputs = [("X", "FP32", [1])]
    outputs = [("Y", "FP32", [1])]
    max_batch_size = 8

    def load(self, context):
        if {refuses}:
            raise ValueError("version {number} does not want to")

    def execute(self, inputs):
        return {{"Y": inputs["X"] + {number}}}
"""
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Content:
    """A version's files; what it adds to its input tells it from all others."""

    number: int
    files: Mapping[str, bytes]
    refuses: bool = False

    @staticmethod
    def make(rng: random.Random, *, most_bytes: int, refuses: bool = False) -> Content:
        number = next(_numbers)
        files = {"model.py": MODEL.format(number=number, refuses=refuses).encode()}
        for name in ("shared.bin", "own.bin"):
            if rng.random() < 0.7:  # what is shared by several versions is one blob
                source = random.Random(rng.randrange(3) if name == "shared.bin" else number)
                files[name] = source.randbytes(source.randrange(1, most_bytes))
        return Content(number, files, refuses)

    def write(self, folder: Path) -> Path:
        for name, content in self.files.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    @cached_property
    def digests(self) -> dict[str, str]:
        return {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}


@dataclass
class Step:
    """A change that is asked for: again and again with the same key, until somebody says what became of it.

    ``told`` is a part of what the audit log says of it. ``make`` asks, ``take`` notes the answer in the book.
    """

    method: str
    told: Mapping[str, Any]
    make: Callable[[Any], Any]
    take: Callable[[Any], None]
    attempts: int = 0

    def __str__(self) -> str:
        return f"{self.method.rpartition('/')[2]} {dict(self.told)}"


@dataclass
class Book:
    """One model, which one operator alone changes."""

    model: str
    is_steady: bool
    description: str = ""
    aliases: dict[str, int] = field(default_factory=dict)
    versions: dict[int, Content] = field(default_factory=dict)
    deleted: dict[int, Content] = field(default_factory=dict)
    #: What was acknowledged, in order.
    done: list[Step] = field(default_factory=list)
    pending: Step | None = None
    is_deployed: bool = False
    #: Shares by hand; None: as the last rollout left them.
    by_hand: dict[int, float] | None = None
    instances: int = 0
    rollouts: set[str] = field(default_factory=set)

    def content(self, version: int) -> Content | None:
        return self.versions.get(version) or self.deleted.get(version)

    def usable(self) -> list[int]:
        """What may serve: of a steady model only what does."""
        return [version for version, content in self.versions.items() if not (self.is_steady and content.refuses)]

    def take_version(self, found: ModelVersion, content: Content) -> None:
        assert found.model == self.model and found.version not in self.versions, found
        assert {each.path: each.sha256 for each in found.files} == content.digests
        self.versions[found.version] = content

    def take_deployment(self, found: Deployment) -> None:
        assert found.model == self.model
        self.is_deployed = True
        self.instances = found.instances
        if found.rollout is not None:
            self.take_rollout(found.rollout)

    def take_rollout(self, found: Rollout) -> None:
        assert found.model == self.model
        self.rollouts.add(found.id)
        if not found.state.is_end:
            self.by_hand = None

    def take_traffic(self, found: Deployment, shares: dict[int, float]) -> None:
        assert {each.version: each.percent for each in found.traffic} == shares
        self.by_hand = shares

    def take_undeployed(self) -> None:
        self.is_deployed, self.by_hand, self.instances = False, None, 0
