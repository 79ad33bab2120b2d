"""The help of a command with so many options that a table would cut their names: in sections, without a frame."""

from __future__ import annotations

from typing import Any, Final

from typer.core import TyperCommand

#: What the names of a section's options begin with; the first that fits.
_SECTIONS: Final = {
    "Registry": ("registry", "artefacts"),
    "gRPC": ("grpc", "allow_grpc", "transport", "io_threads", "reuse_port"),
    "REST": ("http", "allow_http"),
    "Metrics, logs and traces": ("metrics", "allow_metrics", "log_", "trace_"),
    "Cache": ("cache",),
    "Who may do what": ("allow_code", "insecure", "shared_memory"),
    "This command": ("config", "setting", "json", "help"),
}
_OTHERS: Final = "Models"


class SectionedCommand(TyperCommand):
    """As other commands, but for its help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Plain, so that a name that is wide has its text on the next line."""
        self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """One list for each section."""
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in (_OTHERS, *_SECTIONS)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections[_find_section(parameter.name or "")].append(record)
        for name, records in sections.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def _find_section(name: str) -> str:
    return next((section for section, starts in _SECTIONS.items() if name.startswith(starts)), _OTHERS)
