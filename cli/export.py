"""`modelzip export MODEL --to FORMAT`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.locate import check_named
from modelzip.recipes.describe import either
from modelzip.recipes.export_formats import AUTO, FLOATS, FORMATS, either_format
from modelzip.recipes.naming import export_output, model_name
from modelzip.recipes.problems import suggestion
from modelzip.recipes.schema import Export

from .options import Option, command, switch_options
from .output import write, write_json

NAMES: Final = tuple(FORMATS)
SCHEMES: Final = tuple(dict.fromkeys([AUTO, *(scheme for one in FORMATS.values() for scheme in one.schemes)]))
DTYPES: Final = (AUTO, *FLOATS)
OPTIONS: Final = (
    Option("model", (), "A folder, a hub id or a .gguf file.", "argument", metavar="MODEL", required=True),
    Option("to", ("--to",), f"The format: {either(NAMES)}.", metavar="FORMAT", words=NAMES, required=True),
    Option("output", ("--output", "-o"), "Output folder; without one, named after model and format.", metavar="TEXT"),
    Option(
        "scheme",
        ("--scheme",),
        "How matrices are stored, in the format's own words (W8A8, Q4_0, int8, ...); auto as they are, if it can.",
        metavar="WORD",
        words=SCHEMES,
    ),
    Option("dtype", ("--dtype",), f"Type of all floating tensors: {either(DTYPES)}.", metavar="WORD", words=DTYPES),
    Option("revision", ("--revision",), "Branch, tag or commit of a hub model.", metavar="TEXT"),
    Option("push", ("--push-to-hub",), "Upload the output to this repository of the Hugging Face Hub.", metavar="NAME"),
    *switch_options("no_verify", "private", "overwrite", "json", "debug"),
)


def export() -> Callable[..., None]:
    """The command `export`."""
    doc = "Write a model in another format. Example: modelzip export ./small --to gguf\n\n" + either_format() + "."
    return command(OPTIONS, _export, doc)


def _export(values: Mapping[str, Any]) -> None:
    model = values["model"]
    asked = _asked(values)
    check_named(model, revision=values["revision"])
    named = Path(model_name(model))
    folder = Path(asked.output).expanduser() if asked.output else export_output(named, asked.format)
    from modelzip.checkpoints.index import Checkpoint
    from modelzip.exporters.formats import export
    from modelzip.exporters.hub import Repository
    from modelzip.exporters.request import request_of
    from modelzip.pipeline.exported import check_export, said

    from .progress import shown_progress

    name, private = values["push"], bool(values["private"])
    repository = None if name is None else Repository.checked(name, private=private)
    checkpoint = Checkpoint.open(model, revision=values["revision"])
    with shown_progress() as progress:
        request = request_of(
            asked,
            checkpoint,
            folder,
            overwrite=bool(values["overwrite"]),
            report=lambda done, total: progress.step("export", done, total),
        )
        written = export(request, asked.format)
        verification = check_export(checkpoint, asked.format, written) if asked.verify else {"skipped": "--no-verify"}
        url = repository.push(written.path) if repository is not None else None
    size = written.nbytes
    if values["json"]:
        told: dict[str, Any] = {"output": str(written.path), "format": asked.format, "scheme": asked.scheme}
        told |= {
            "bytes_before": checkpoint.nbytes,
            "bytes_after": size,
            "rounded": list(written.rounded),
            "notes": list(written.notes),
        }
        write_json({**told, "verification": verification, "url": url})
        return
    write(f"output: {written.path} ({checkpoint.nbytes / 1e6:,.2f} MB → {size / 1e6:,.2f} MB)")
    for line in (*written.rounded, *written.notes, said(verification), *([f"uploaded: {url}"] if url else [])):
        write(line)


def _asked(values: Mapping[str, Any]) -> Export:
    """The options as an entry of a recipe's `export`. Raises RecipeError for a word that the format doesn't know."""
    format = values["to"]
    if format not in FORMATS:
        raise RecipeError(f"--to: {format} is not known; {suggestion(format, NAMES)}")
    schemes = {word.lower(): word for word in (AUTO, *FORMATS[format].schemes)}
    scheme = schemes.get((values["scheme"] or AUTO).lower(), values["scheme"])
    dtype = values["dtype"] or AUTO
    known = {"--scheme": (scheme, tuple(schemes.values())), "--dtype": (dtype, (AUTO, *FORMATS[format].dtypes))}
    for option, (word, words) in known.items():
        if word not in words and len(words) == 1:
            raise RecipeError(f"{option}: {format} has none to choose; leave the option out.")
        if word not in words:
            raise RecipeError(f"{option}: {word} is not known to {format}; {suggestion(word, words)}")
    if values["private"] and values["push"] is None:
        raise RecipeError("--private is of an upload: name its repository with --push-to-hub.")
    given = {"output": values["output"], "scheme": scheme, "dtype": dtype, "verify": not values["no_verify"]}
    return Export.model_validate({"format": format, **given})
