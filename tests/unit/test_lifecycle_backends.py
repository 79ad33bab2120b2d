"""How backends are found, and what becomes of those that are missing or broken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from aiorch_server.backend import Backend, LoadContext, ModelInstance
from aiorch_server.errors import ModelLoadError
from aiorch_server.lifecycle.backends import BackendRegistry
from aiorch_server.types import ModelSignature

NO_GROUP = "aiorch.nobody.registers.here"


class Nothing(Backend):
    name = "nothing"
    platforms = ("nothing_graph", "nothing_plan")
    artefacts = ("model.nothing", "model.onnx")

    def inspect(self, context: LoadContext) -> ModelSignature:
        raise ModelLoadError("nothing")

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        raise ModelLoadError("nothing")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "plugin_of_a_test"
    (tmp_path / f"{name}.py").write_text(
        "from aiorch_backends.identity import IdentityBackend\n"
        "class Mine(IdentityBackend):\n    name = 'mine'\n    artefacts = ('model.onnx', 'model.mine')\n"
        "class Outer:\n    Mine = Mine\n"
        "number = 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop(name, None)
    return name


def test_a_plugin_is_found_by_module_and_attribute(plugin: str) -> None:
    for attribute in ("Mine", "Outer.Mine"):
        registry = BackendRegistry([f"{plugin}:{attribute}"], group=NO_GROUP)
        assert registry.get("mine").name == "mine"
        assert registry.get("mine") is registry.get("mine"), "one object per process"


def test_a_backend_is_found_by_platform_and_the_best_artefact_name_wins(plugin: str) -> None:
    registry = BackendRegistry([f"{plugin}:Mine"], group=NO_GROUP)
    registry.add(Nothing())
    assert registry.get("nothing_plan").name == "nothing"
    assert registry.platforms()["nothing_graph"] == "nothing"
    names = registry.artefact_names()
    assert names["model.onnx"] == "mine", "first choice of one beats second choice of another"
    assert list(names) == ["model.nothing", "model.onnx", "model.mine"]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("no_such_module_at_all:X", "ModuleNotFoundError"),
        ("plugin_of_a_test:Absent", "AttributeError"),
        ("plugin_of_a_test:number", "not a subclass"),
        ("plugin_of_a_test", "module:attribute"),
    ],
)
def test_a_broken_backend_is_only_told_to_who_needs_it(plugin: str, broken: str, reason: str) -> None:
    registry = BackendRegistry([broken, f"{plugin}:Mine"], group=NO_GROUP)
    assert registry.get("mine").name == "mine"
    with pytest.raises(ModelLoadError, match=reason):
        registry.get(broken)
    with pytest.raises(ModelLoadError, match=f"there is no backend 'other'; known here: mine; .*{reason}"):
        registry.get("other")


def test_a_backend_that_exits_while_it_is_imported_does_not_take_the_others_along(plugin: str, tmp_path: Path) -> None:
    (tmp_path / "plugin_that_exits.py").write_text("raise SystemExit('no licence')")
    registry = BackendRegistry(["plugin_that_exits:X", f"{plugin}:Mine"], group=NO_GROUP)
    assert registry.get("mine").name == "mine"
    with pytest.raises(ModelLoadError, match="SystemExit: no licence"):
        registry.get("plugin_that_exits:X")
