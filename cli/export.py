"""`modelzip export MODEL --to dense`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.locate import check_named
from modelzip.recipes.describe import choices, either
from modelzip.recipes.naming import export_output, model_name
from modelzip.recipes.problems import suggestion
from modelzip.recipes.schema import Export

from .options import Option, command, switch_options
from .output import write, write_json

FORMATS: Final = choices(Export.model_fields["format"])
DTYPES: Final = choices(Export.model_fields["dtype"])
OPTIONS: Final = (
    Option("model", (), "A folder, a hub id or a .gguf file.", "argument", metavar="MODEL", required=True),
    Option("to", ("--to",), f"The format: {either(FORMATS)}.", metavar="FORMAT", words=FORMATS, required=True),
    Option("output", ("--output", "-o"), "Output folder; without one, named after model and format.", metavar="TEXT"),
    Option("dtype", ("--dtype",), f"Type of all floating tensors: {either(DTYPES)}.", metavar="WORD", words=DTYPES),
    Option("revision", ("--revision",), "Branch, tag or commit of a hub model.", metavar="TEXT"),
    *switch_options("overwrite", "json", "debug"),
)


def export() -> Callable[..., None]:
    """The command `export`."""
    doc = (
        "Write a model in another format. Example: modelzip export ./small --to dense\n\n"
        "`dense` makes a plain checkpoint of a compressed one, which opens without modelzip."
    )
    return command(OPTIONS, _export, doc)


def _export(values: Mapping[str, Any]) -> None:
    model, format, dtype = values["model"], values["to"], values["dtype"] or "auto"
    for option, word, words in (("--to", format, FORMATS), ("--dtype", dtype, DTYPES)):
        if word not in words:
            raise RecipeError(f"{option}: {word} is not known; {suggestion(word, words)}")
    check_named(model, revision=values["revision"])
    folder = Path(values["output"]).expanduser() if values["output"] else export_output(Path(model_name(model)), format)
    from modelzip.checkpoints.index import Checkpoint
    from modelzip.exporters.formats import export

    from .progress import shown_progress

    checkpoint = Checkpoint.open(model, revision=values["revision"])
    with shown_progress() as progress:
        written = export(
            checkpoint,
            format,
            folder,
            dtype=dtype,
            overwrite=bool(values["overwrite"]),
            report=lambda done, total: progress.step("export", done, total),
        )
    size = Checkpoint.open(str(written)).nbytes
    if values["json"]:
        write_json({"output": str(written), "format": format, "bytes_before": checkpoint.nbytes, "bytes_after": size})
    else:
        write(f"output: {written} ({checkpoint.nbytes / 1e6:,.2f} MB → {size / 1e6:,.2f} MB)")
