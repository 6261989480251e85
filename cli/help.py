"""How `--help` looks: plain text, options in sections."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand


class Sectioned(TyperCommand):
    """A command whose help lists its options under the headings that they name as their panel, all others last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                own = getattr(parameter, "rich_help_panel", None)
                other = "Arguments" if parameter.param_type_name == "argument" else "Options"
                sections.setdefault(own or other, []).append(record)
        for heading, records in sorted(sections.items(), key=lambda section: section[0] == "Options"):
            with formatter.section(heading):
                formatter.write_dl(records)
