"""Writes the table of docs/security.md from the server's own table of permissions; run it after changing that."""

from __future__ import annotations

from pathlib import Path

from aiorch_server.security.permissions import TABLE, Permission, Scope
from aiorch_server.security.roles import Role

PAGE = Path(__file__).with_name("security.md")
BEGIN, END = "<!-- table: docs/write_permissions.py -->\n", "<!-- end of the table -->\n"
#: The V2 service under the package of our own .proto files; the same calls, shown once.
_TWIN = "/aiorch.v2."
_ON = {Scope.MODEL: "the model", Scope.ANYWHERE: "some model", Scope.SERVER: "all models"}


def render_table() -> str:
    """A row per call, with a mark for each role that may make it, and on what the role must be held."""
    roles = list(Role)
    lines = ["| call | anybody | known | " + " | ".join(role.name.lower() for role in roles) + " | on |"]
    lines.append("|---" * (len(roles) + 4) + "|")
    for permission in TABLE.values():
        if not permission.call.startswith(_TWIN):
            marks = _list_marks(permission)
            lines.append(f"| `{permission.call}` | {' | '.join(marks)} | {_ON.get(permission.scope, '')} |")
    return "\n".join(lines) + "\n"


def _list_marks(permission: Permission) -> list[str]:
    is_open, is_known = permission.scope is Scope.OPEN, permission.scope in (Scope.OPEN, Scope.KNOWN)
    marks = ["x" if is_open else "", "x" if is_known else ""]
    for role in Role:
        may = is_known or role >= (permission.role or Role.ADMIN)
        reads_only = may and permission.change is not None and role < permission.change
        marks.append("read" if reads_only else "x" if may else "")
    return marks


def write_page(text: str) -> str:
    """``text`` of the page with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{render_table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(write_page(PAGE.read_text()))
