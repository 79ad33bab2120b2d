"""Reads YAML mappings safely: no tags, no aliases, no doubled keys, and errors with line and column."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from aiorch_server.config.problems import format_found


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without what hides mistakes (doubled keys) or grows without bound (aliases of aliases)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read here; write the value", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain name", key.start_mark)
            if key.value in seen:
                text = f"key {format_found(key.value)} is written more than once"
                raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping in ``text``; empty text is an empty mapping.

    Raises ValueError ``<source>:<line>:<column>: ...`` for anything that is not one mapping with string keys.
    """
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        problem = error.problem or error.context or "cannot be read"
        if "tag" in problem:  # it is named there, and a password may begin as one does
            problem = "tags (!name) are not read here; write such a value in quotes"
        raise ValueError(f"{place}: {problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ValueError(f"{source}: nested too deeply") from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{source}: must be a mapping of keys to values")
    return data
