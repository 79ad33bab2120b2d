"""Imports point downwards only, and a few things are known in one place only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "aiorch_server"

#: Parts of aiorch_server by level; a part may import what is below it, and itself.
LEVELS = {
    "types": 0,
    "errors": 0,
    "backend": 0,
    "config": 0,
    "_core": 0,
    "tracing": 0,
    "pauses": 0,
    "validation": 1,
    "repository": 1,
    "observability": 1,
    "exchange": 1,
    "cache": 1,
    "registry": 1,
    "security": 1,
    "routing": 1,
    "execution": 1,
    "scheduling": 2,
    "lifecycle": 3,
    "deployments": 4,
    "optimizer": 4,
    "dataplane": 4,
    "controlplane": 4,
    "frontends": 5,
    "assembly": 6,
    "app": 7,
    "cli": 8,
    "testing": 8,
    "environment": 8,
}
#: Within level 0: what stands on what.
GROUND = {
    "types": set(),
    "errors": set(),
    "backend": {"types", "errors"},
    "config": {"types", "errors", "backend"},
    "_core": {"types", "errors"},
    "tracing": {"types", "errors"},
    "pauses": set(),
}
#: Third-party packages that only these parts may know.
KNOWN_ONLY_BY = {
    "grpc": ("frontends", "cli"),
    "grpc_health": ("frontends",),
    "grpc_reflection": ("frontends",),
    "google": ("frontends", "config/pbtxt.py"),
    "aiorch_proto": ("frontends", "config/pbtxt.py"),
    "sqlalchemy": ("registry",),
    "alembic": ("registry",),
    "fsspec": ("registry",),
    "jwt": ("security",),
    "cryptography": ("security",),
    "starlette": ("frontends",),
    "msgspec": ("frontends",),
    "uvicorn": ("frontends",),
    "typer": ("cli",),
    "rich": ("cli",),
    "uvloop": ("cli",),
    "aiorch_client": ("cli",),
    "gymnasium": ("environment",),
    "aiorch_backends": (),
}


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module
            yield node.module, node.lineno
            if node.module == "aiorch_server":
                for alias in node.names:
                    yield f"aiorch_server.{alias.name}", node.lineno


def part_of(path: Path) -> str:
    return path.relative_to(SERVER).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(SERVER), ids=lambda path: str(path.relative_to(ROOT)))
def test_server_layers(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        assert not list(imports(path))
        return
    assert part in LEVELS, f"{part} has no level yet: decide where it belongs"
    where = str(path.relative_to(SERVER))
    for name, line in imports(path):
        top, _, rest = name.partition(".")
        if top == "aiorch_server" and rest:
            target = rest.split(".")[0]
            if target in (part, "__version__", "__init__"):
                continue
            if LEVELS[part] == 0:
                assert target in GROUND[part], f"{where}:{line}: {part} may not import {target}"
            else:
                assert LEVELS[target] < LEVELS[part], f"{where}:{line}: {part} may not import {target}"
            if target == "_core":
                assert rest == "_core", f"{where}:{line}: only _core/__init__.py imports extension modules"
        elif top in KNOWN_ONLY_BY:
            assert any(where.startswith(place) for place in KNOWN_ONLY_BY[top]), f"{where}:{line}: may not import {top}"


@pytest.mark.parametrize(
    "path", modules(ROOT / "backends/aiorch_backends"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_backends_know_only_the_interface(path: Path) -> None:
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == "aiorch_server":
            assert parts[1] in {"backend", "types", "errors"}, f"{path}:{line}: imports {name}"
        assert parts[0] not in {"aiorch_client", "aiorch_proto", "grpc"}, f"{path}:{line}: imports {name}"


@pytest.mark.parametrize(
    "path", modules(ROOT / "clients/python/aiorch_client"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_client_stands_alone(path: Path) -> None:
    for name, line in imports(path):
        assert name.split(".")[0] not in {"aiorch_server", "aiorch_backends"}, f"{path}:{line}: imports {name}"


def test_only_one_module_reads_the_environment() -> None:
    readers = [
        str(path.relative_to(SERVER))
        for path in modules(SERVER)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"}
    ]
    assert set(readers) <= {"config/load.py"}


def test_files_stay_readable() -> None:
    """Aim at 250 lines, argue above 400, never above 600 (700 for a compiled module)."""
    for folder in (SERVER, ROOT / "backends", ROOT / "clients", ROOT / "benchmarks", ROOT / "examples"):
        for path in [*folder.rglob("*.py"), *folder.rglob("*.pyx")]:
            lines = len(path.read_text().splitlines())
            assert lines <= (700 if path.suffix == ".pyx" else 600), f"{path} has {lines} lines: split it"
