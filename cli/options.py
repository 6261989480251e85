"""The options of the verbs, made from the fields of the recipe's classes: a new field is a new option by itself.

typer reads a command's options off its function's signature, so `command` makes a function with the right one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from modelzip.compressors.settings import MethodSettings
from modelzip.recipes.describe import allowed, choices, default, either, extra, shape
from modelzip.recipes.schema import Calibration, Evaluation, Recipe, Stage

from .failures import guarded

STAGE: Final = "@stage"
"""First part of the path of an option that goes to the verb's own stage."""

WIDEST: Final = 18
"""Characters of the words that an option takes, beyond which they stand in its help instead of beside it."""


@dataclass(frozen=True)
class Option:
    """One option: how it is typed, and at which path of the recipe its value goes (nowhere, if the path is empty)."""

    name: str
    flags: tuple[str, ...]
    help: str
    kind: Literal["text", "switch", "list", "argument"] = "text"
    path: tuple[str, ...] = ()
    metavar: str | None = None
    words: tuple[str, ...] = ()
    panel: str | None = None
    required: bool = False

    @property
    def said(self) -> str:
        """What a problem calls this option."""
        return self.flags[0].split("/")[0] if self.flags else str(self.metavar)

    def parameter(self) -> inspect.Parameter:
        """The parameter that makes typer offer it."""
        words = list(self.words)
        more: dict[str, Any] = {"help": self.help, "rich_help_panel": self.panel}
        if self.kind != "switch":
            more["metavar"] = self.metavar
        if words:
            more["autocompletion"] = lambda incomplete: [word for word in words if word.startswith(incomplete)]
        types: dict[str, Any] = {"text": str, "argument": str, "switch": bool, "list": list[str]}
        given = typer.Argument(**more) if self.kind == "argument" else typer.Option(*self.flags, **more)
        wanted = types[self.kind] if self.required else types[self.kind] | None
        missing = inspect.Parameter.empty if self.required else None
        annotation = Annotated[wanted, given]  # type: ignore[valid-type]  # a type that is put together at run time
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=missing, annotation=annotation)


def command(options: Sequence[Option], run: Callable[[Mapping[str, Any]], None], doc: str) -> Callable[..., None]:
    """A function for typer with these options. `run` gets the values by name, None for what was not given."""

    def call(**values: Any) -> None:
        guarded(lambda: run(values))

    parameters = [option.parameter() for option in options]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    call.__doc__ = doc
    return call


def field_option(
    cls: type[BaseModel], key: str, path: tuple[str, ...], *, flag: str = "", panel: str | None, note: str = ""
) -> Option:
    """The option of one field of a recipe class."""
    field = cls.model_fields[key]
    flag = flag or "--" + key.replace("_", "-")
    name = "set_" + "_".join(path).replace("@", "")
    words = choices(field)
    long = len("|".join(words)) > WIDEST
    one_of = f"One of {either(words)}." if long else ""
    told = " ".join(part for part in (field.description, one_of, note, _default_note(field)) if part)
    if field.annotation is bool:
        negative = extra(field, "negative")
        off = f"--{negative}" if negative else f"--no-{flag.removeprefix('--')}"
        return Option(name, (f"{flag}/{off}",), told, kind="switch", path=path, panel=panel)
    many = shape(field) == "list" and not words
    metavar = "WORD" if long else _metavar(field, words)
    flags = ("-o", flag) if flag == "--output" else (flag,)
    return Option(
        name, flags[::-1], told, kind="list" if many else "text", path=path, metavar=metavar, words=words, panel=panel
    )


def _metavar(field: FieldInfo, words: tuple[str, ...]) -> str:
    if shape(field) != "one":
        listed = "TEXT" if allowed(field) == "a list of texts" else "LIST"
        return "KEY=VALUE" if shape(field) == "mapping" else "|".join([listed, *words])
    told = allowed(field)
    if words and told == either(words):
        return "|".join(words)
    number = "FLOAT" if "float" in str(field.annotation) else "INTEGER"
    return "|".join([number, *words]) if "int" in str(field.annotation) or number == "FLOAT" else "TEXT"


def _default_note(field: FieldInfo) -> str:
    told = default(field)
    return f"(default: {told})" if told and told != "[]" else ""


def settings_options(cls: type[Stage]) -> list[Option]:
    """One option for each setting that any method of a stage has."""
    names = tuple(cls.methods)
    method = Option(
        "set_stage_method",
        ("--method",),
        f"{either(names)}; `modelzip methods` tells what they do. (default: {cls.default_method})",
        path=(STAGE, "method"),
        metavar="NAME",
        words=names,
        panel="Method",
    )
    first_owner: dict[str, type[MethodSettings]] = {}
    for settings in cls.methods.values():
        for key in settings.model_fields:
            first_owner.setdefault(key, settings)
    options = [method]
    for key, settings in first_owner.items():
        owners = [name for name, one in cls.methods.items() if key in one.model_fields]
        note = "" if len(owners) == len(names) else f"Only for {either(owners)}."
        others = [
            name for name in owners if shape(cls.methods[name].model_fields[key]) != shape(settings.model_fields[key])
        ]
        if others:
            first = [name for name in owners if name not in others]
            meant = cls.methods[others[0]].model_fields[key].description
            note = f"Only for {either(first)}. For {either(others)}: {meant}"
        if key != "method":
            options.append(field_option(settings, key, (STAGE, key), panel="Method", note=note))
    ignore = "Leave modules alone that fit: a glob such as *.down_proj, or re: and an expression. May be repeated."
    more = "Any other setting, as in the recipe: key=value, or section.key=value. May be repeated."
    return [
        *options,
        Option("set_stage_ignore", ("--ignore",), ignore, "list", (STAGE, "ignore"), "PATTERN", panel="Method"),
        Option("set", ("--set",), more, "list", metavar="KEY=VALUE", panel="Method"),
    ]


def calibration_options() -> list[Option]:
    """The options of the recipe's section `calibration`; `source` is --calibration."""
    return [
        field_option(
            Calibration,
            key,
            ("calibration", key),
            flag="--calibration" if key == "source" else "",
            panel="Calibration",
        )
        for key in Calibration.model_fields
    ]


def machine_options() -> list[Option]:
    """Where and in which type to compute, and which version of a hub model."""
    return [field_option(Recipe, key, (key,), panel="Machine") for key in ("device", "dtype", "revision")]


def evaluation_options() -> list[Option]:
    """How a compressing verb evaluates what it made."""
    flags = {"data": "--eval-data", "windows": "--eval-windows", "enabled": "--evaluate", "fail_if": "--fail-if"}
    return [
        field_option(Evaluation, key, ("evaluate", key), flag=flag, panel="Evaluation") for key, flag in flags.items()
    ]


SWITCHES: Final = {
    "dry_run": "Print the plan (every module, sizes, memory and disk needed) and stop.",
    "overwrite": "Replace the output folder if there is one.",
    "resume": "Go on with an interrupted run.",
    "json": "Print only the result on stdout, as JSON.",
    "debug": "Show tracebacks and the libraries' own messages.",
}


def switch_options(*names: str) -> list[Option]:
    """Plain switches that are no part of the recipe."""
    return [Option(name, ("--" + name.replace("_", "-"),), SWITCHES[name], kind="switch") for name in names]


def run_options() -> list[Option]:
    """What all commands that compress have in common."""
    return [
        field_option(Recipe, "output", ("output",), panel="Run"),
        field_option(Recipe, "seed", ("seed",), panel="Run"),
        *calibration_options(),
        *evaluation_options(),
        *machine_options(),
        *switch_options("dry_run", "overwrite", "resume", "json", "debug"),
    ]


MODEL: Final = Option(
    "model",
    (),
    "A folder, a hub id or a .gguf file. Without one: the recipe modelzip.yaml of the current folder, else the demo "
    "model if it is installed.",
    kind="argument",
    path=("model",),
    metavar="MODEL",
)
RECIPE: Final = Option("recipe", ("--recipe",), "A recipe file, or the name of a shipped recipe.", metavar="FILE")
