"""`modelzip methods [NAME]`: what there is, printed from the settings classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from modelzip.checkpoints.errors import RecipeError
from modelzip.compressors.settings import MethodSettings
from modelzip.recipes.describe import allowed, default
from modelzip.recipes.problems import suggestion
from modelzip.recipes.schema import STAGES

from .options import Option, command, switch_options
from .output import write_rich

METHODS: Final = tuple(name for stage in STAGES.values() for name in stage.methods)
NAME: Final = Option("name", (), "A method, to see its settings.", "argument", metavar="NAME", words=METHODS)


def methods() -> Callable[..., None]:
    """The command `methods`."""
    return command([NAME, *switch_options("debug")], _methods, "List the methods, or the settings of one.")


def _methods(values: Mapping[str, Any]) -> None:
    name = values["name"]
    if name is None:
        _list()
        return
    found = [(kind, stage.methods[name]) for kind, stage in STAGES.items() if name in stage.methods]
    if not found:
        raise RecipeError(f"{name}: is not a method; {suggestion(name, METHODS)}")
    for kind, settings in found:
        _one(kind, name, settings)


def _list() -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("method", "verb", "what it does", "source")
    for kind, stage in STAGES.items():
        for name, settings in stage.methods.items():
            table.add_row(*(Text(one) for one in (name, kind, settings.summary, settings.citation)))
    write_rich(table, Text("`modelzip methods NAME` shows a method's settings."))


def _one(kind: str, name: str, settings: type[MethodSettings]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("setting", "values", "default", "what it does")
    for key, field in settings.model_fields.items():
        if key != "method":
            table.add_row(*(Text(one) for one in (key, allowed(field), default(field), field.description or "")))
    write_rich(
        Text(f"{name} ({kind}): {settings.summary}"),
        Text(f"Source: {settings.citation}"),
        table,
        Text(f"In a recipe:\nstages:\n{_indented(settings.example)}"),
    )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
