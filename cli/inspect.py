"""`modelzip inspect MODEL` and `modelzip compare A B`: what models are made of, from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.locate import check_named
from modelzip.recipes.schema import Recipe

from .options import Option, command, field_option, switch_options
from .output import write_json, write_rich
from .request import checked
from .show import megabytes

MODEL: Final = Option("model", (), "A folder, a hub id or a .gguf file.", "argument", metavar="MODEL", required=True)
OTHER: Final = Option("other", (), "The model beside it.", "argument", metavar="OTHER", required=True)
SIZES: Final = (
    Option("batch_size", ("--batch-size",), "Texts in the forward pass. (default: 1)", metavar="INTEGER"),
    Option(
        "seq_len", ("--seq-len",), "Tokens of each text. (default: 512, or what the model takes)", metavar="INTEGER"
    ),
)
MEASURE: Final = Option("measure", ("--measure",), "Also run the model: time and memory of each component.", "switch")
REVISION: Final = Option("revision", ("--revision",), "Branch, tag or commit of a hub model.", metavar="TEXT")


def inspect() -> Callable[..., None]:
    """The command `inspect`."""
    device = field_option(Recipe, "device", ("device",), panel=None)
    options = [MODEL, *SIZES, MEASURE, device, REVISION, *switch_options("json", "debug")]
    doc = "Show parameters, bytes and FLOPs by component. Example: modelzip inspect ./my-model --measure"
    return command(options, _inspect, doc)


def compare() -> Callable[..., None]:
    """The command `compare`."""
    options = [MODEL, OTHER, *SIZES, MEASURE, field_option(Recipe, "device", ("device",), panel=None)]
    doc = "Show two models' parameters, bytes and FLOPs side by side. Example: modelzip compare ./my-model ./small"
    return command([*options, *switch_options("json", "debug")], _compare, doc)


def _inspect(values: Mapping[str, Any]) -> None:
    (found,) = _found([values["model"]], values, revision=values["revision"])
    if values["json"]:
        write_json(found)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("component", title=_title(found), title_justify="left")
    for heading in ("parameters", "MB", "bits a parameter", "GFLOP", "of all FLOPs", *_measures(found)):
        table.add_column(heading, justify="right")
    for row in (*found["components"], _total(found)):
        share = "" if not found["flops"] or row["flops"] is None else f"{row['flops'] / found['flops']:.1%}"
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            megabytes(row["bytes"]),
            f"{8 * row['bytes'] / row['parameters']:.2f}" if row["parameters"] else "",
            _giga(row["flops"]),
            share,
            *(f"{row[key] * factor:,.2f}" for key, factor in _measures(found).values()),
        )
    write_rich(table, *([Text(found["note"])] if found["note"] else []))


def _compare(values: Mapping[str, Any]) -> None:
    both = _found([values["model"], values["other"]], values, revision=None)
    if values["json"]:
        write_json({"models": both})
        return
    from rich.table import Table
    from rich.text import Text

    title = " beside ".join(_title(one) for one in both)
    table = Table("component", title=title, title_justify="left")
    keys = {"parameters": ("parameters", 1e-6), "MB": ("bytes", 1e-6), "GFLOP": ("flops", 1e-9), **_measures(both[0])}
    for heading in keys:
        table.add_column("million parameters" if heading == "parameters" else heading, justify="right")
    sides = ([*one["components"], _total(one)] for one in both)
    for first, second in zip(*sides, strict=True):
        table.add_row(first["name"], *(_beside(first[key], second[key], factor) for key, factor in keys.values()))
    write_rich(table, *(Text(one["note"]) for one in both if one["note"]))


def _found(names: Sequence[str], values: Mapping[str, Any], *, revision: str | None) -> list[dict[str, Any]]:
    """What is found of each model."""
    batch_size, seq_len = (_whole(values[key], f"--{key.replace('_', '-')}") for key in ("batch_size", "seq_len"))
    if values["set_device"] is not None and not values["measure"]:
        raise RecipeError("--device says where components are measured: give --measure as well, or leave it out.")
    given = {} if values["set_device"] is None else {"device": values["set_device"]}
    device = checked(given, "", renamed={"device": "--device"}, least_stages=0).device
    for name in names:
        check_named(name, revision=revision)
    from modelzip.checkpoints.index import Checkpoint
    from modelzip.pipeline.inspection import inspect_models

    return inspect_models(
        [Checkpoint.open(name, revision=revision) for name in names],
        batch_size=batch_size or 1,
        seq_len=seq_len,
        device=device if values["measure"] else None,
    )


def _whole(value: str | None, option: str) -> int | None:
    """A number above 0. Raises RecipeError."""
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise RecipeError(f"{option}: {value} is no whole number above 0.")
    return int(value)


def _title(found: Mapping[str, Any]) -> str:
    return f"{found['model']} ({found['architecture']}, {found['batch_size']} × {found['seq_len']} tokens)"


def _total(found: Mapping[str, Any]) -> dict[str, Any]:
    measured = {key: sum(row[key] for row in found["components"]) for key, _ in _measures(found).values()}
    return {"name": "all", **{key: found[key] for key in ("parameters", "bytes", "flops")}, **measured}


def _measures(found: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
    """Columns of what was measured: heading, key and factor."""
    if "seconds" not in found["components"][0]:
        return {}
    return {"ms": ("seconds", 1e3), "activations, MB": ("activation_bytes", 1e-6)}


def _giga(flops: int | None) -> str:
    return "–" if flops is None else f"{flops / 1e9:,.3f}"


def _beside(first: float | None, second: float | None, factor: float) -> str:
    """Two figures, and what the second is of the first."""
    if first is None or second is None:
        return "–"
    ratio = second / first if first else 0.0
    share = "" if not ratio else f" ({ratio:,.0f} ×)" if ratio >= 10 else f" ({ratio:.0%})"
    return f"{first * factor:,.2f} → {second * factor:,.2f}{share}"
