"""Writes the table of docs/model-configuration.md from the configuration's classes; run it after changing them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiorch_server.config.model import ModelConfig
from aiorch_server.config.problems import _section_in
from aiorch_server.config.support import NO_EFFECT, REFUSED, Restriction

PAGE = Path(__file__).with_name("model-configuration.md")
BEGIN, END = "<!-- table: docs/write_model_configuration.py -->\n", "<!-- end of the table -->\n"


def list_fields(section: Any = ModelConfig, prefix: str = "") -> Iterator[str]:
    """Every field that holds a value, written ``list[].field``; ``{}`` stands for the keys of a map."""
    for name, field in section.model_fields.items():
        text = str(field.annotation)
        path = prefix + (field.alias or name) + ("[]" if "tuple[" in text else "{}" if "Mapping[" in text else "")
        nested = _section_in(field.annotation)
        if nested is None or not nested.model_fields or _find(NO_EFFECT, path) or _find(REFUSED, path):
            yield path
        else:
            yield from list_fields(nested, f"{path}.")


def _find(restrictions: tuple[Restriction, ...], path: str) -> Restriction | None:
    plain = path.replace("{}", "").removesuffix("[]")
    return next((each for each in restrictions if each.path == plain), None)


def write_table() -> str:
    """One line per field: what is done with it."""
    lines = ["| field | | |", "|---|---|---|"]
    for path in list_fields():
        name = path if path.endswith("{}") else path.removesuffix("[]")
        if refused := _find(REFUSED, path):
            values = ", ".join(f"`{value}`" for value in refused.values)
            lines.append(f"| `{name}` | {f'honoured; refused: {values}' if values else 'refused'} | {refused.reason} |")
        elif idle := _find(NO_EFFECT, path):
            lines.append(f"| `{name}` | no effect | {idle.reason} |")
        else:
            lines.append(f"| `{name}` | honoured | |")
    return "\n".join(lines) + "\n"


def render(page: str) -> str:
    """The page with a table that is up to date."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{write_table()}\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
