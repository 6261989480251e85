"""`modelzip sweep RECIPE`: a run for each combination of settings, one table, one plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from modelzip.checkpoints.errors import GateError, RecipeError
from modelzip.checkpoints.locate import check_named
from modelzip.recipes.naming import model_name
from modelzip.recipes.sweep import Sweep, expand

from .compress import with_model
from .options import Option, command, run_options
from .output import write_json
from .request import checked, data_from

if TYPE_CHECKING:
    from modelzip.evaluation.sweep import SweepReport
    from modelzip.pipeline.sweeps import Planned

FILE: Final = Option("recipe", (), "A recipe file, or the name of a shipped recipe.", "argument", required=True)
MODEL: Final = Option("model", (), "The model, if not the recipe's.", "argument", ("model",), metavar="MODEL")
VARY: Final = Option(
    "vary",
    ("--vary",),
    "A setting and the values to try, as bits=2,3,4 or quantize.method=rtn,gptq; wins over the recipe's sweep. May be "
    "repeated.",
    "list",
    metavar="KEY=VALUES",
    panel="Sweep",
)
KEEP: Final = Option(
    "keep",
    ("--keep",),
    "Whose weights stay: of all runs, of those that are the best for their size, or of none; reports stay. "
    "(default: all)",
    metavar="all|front|none",
    words=("all", "front", "none"),
    panel="Sweep",
)
SKIP: Final = Option(
    "skip_invalid",
    ("--skip-invalid",),
    "Leave out combinations that can't be run, instead of stopping.",
    "switch",
    panel="Sweep",
)
OUTPUT_HELP: Final = "Folder in which each run has one of its own; without one, named after the model."


def sweep() -> Callable[..., None]:
    """The command `sweep`."""
    common = [replace(one, help=OUTPUT_HELP) if one.path == ("output",) else one for one in run_options()]
    options = [FILE, MODEL, VARY, KEEP, SKIP, *common]
    doc = (
        "Run a recipe with each combination of settings, and show which are the best for their size.\n\n"
        "With --fail-if, it fails if no run passes. Example: modelzip sweep gptq-int4 ./my-model --vary "
        "method=rtn,gptq --vary bits=2,3,4"
    )
    return command(options, lambda values: _sweep(options, values), doc)


def _sweep(options: Sequence[Option], values: Mapping[str, Any]) -> None:
    keep = values["keep"] or "all"
    if keep not in KEEP.words:
        raise RecipeError(f"--keep: {keep} is not allowed; it must be all, front or none")
    data, origin, renamed = data_from(options, values, None)
    for text in values["vary"] or ():
        key, tried = _varied(text)
        section = data.get("sweep") or {}
        if isinstance(section, dict):
            data["sweep"] = {other: one for other, one in section.items() if not _same(key, str(other))} | {key: tried}
    recipe = with_model(checked(data, origin, renamed=renamed))
    data["model"] = recipe.model
    skip_invalid = bool(values["skip_invalid"])
    found = expand(data, origin, renamed=renamed, skip_invalid=skip_invalid)
    check_named(str(recipe.model), revision=recipe.revision)
    folder = Path(recipe.output or f"{model_name(str(recipe.model))}-sweep").expanduser()
    told = {
        "folder": folder,
        "overwrite": bool(values["overwrite"]),
        "resume": bool(values["resume"]),
        "skip_invalid": skip_invalid,
    }
    if values["dry_run"]:
        _plan(found, told, json=bool(values["json"]))
    else:
        _run(found, {**told, "keep": keep}, json=bool(values["json"]))


def _varied(text: str) -> tuple[str, list[Any]]:
    """`KEY=V1,V2` of --vary, where a list may also be written as in YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise RecipeError(f"--vary {text}: must be KEY=VALUES, such as --vary bits=2,3,4")
    try:
        if value.strip().startswith("["):
            return key.strip(), list(yaml.safe_load(value))
        return key.strip(), [_plain(one.strip()) for one in value.split(",")]
    except yaml.YAMLError:
        raise RecipeError(f"--vary {text}: the values are not valid YAML") from None


def _same(key: str, other: str) -> bool:
    """Whether two keys name one setting, of which either may say more of the path."""
    return key == other or key.endswith(f".{other}") or other.endswith(f".{key}")


def _plain(text: str) -> Any:
    """true, false and null as what they are, all else as typed: settings take texts for numbers."""
    parsed = yaml.safe_load(text)
    return parsed if parsed is None or isinstance(parsed, bool) else text


def _plan(found: Sweep, told: Mapping[str, Any], *, json: bool) -> None:
    from modelzip.pipeline.sweeps import plan_sweep

    planned = plan_sweep(found, **told)
    if json:
        runs = [
            {"name": one.name, "choices": one.choices, "plans": [plan.as_dict() for plan in plans]}
            for one, plans in planned.runs
        ]
        write_json({"runs": runs, "skipped": [{"name": one.name, "reason": one.reason} for one in planned.skipped]})
    else:
        _show_plan(planned, told["folder"])


def _show_plan(planned: Planned, folder: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from .output import write_rich
    from .show import megabytes

    table = Table("run", title=Text(f"{planned.runs[0][1][0].source} → {folder}"), title_justify="left")
    for heading in ("MB before", "MB after", "memory, MB", "disk, MB"):
        table.add_column(heading, justify="right")
    for one, plans in planned.runs:
        most = [max(getattr(plan, key) for plan in plans) for key in ("memory_bytes", "disk_bytes")]
        sizes = (plans[0].bytes_before, plans[-1].bytes_after, *most)
        table.add_row(Text(one.name), *map(megabytes, sizes))
    total = sum(plans[-1].bytes_after for _, plans in planned.runs)
    lines = [f"{len(planned.runs)} runs, {megabytes(total)} MB together"]
    lines += [f"left out: {one.reason}" for one in planned.skipped]
    write_rich(table, *map(Text, lines))


def _run(found: Sweep, told: Mapping[str, Any], *, json: bool) -> None:
    from modelzip.checkpoints.memory import keep_freed
    from modelzip.pipeline.sweeps import FailedRunsError, run_sweep

    from .progress import shown_progress

    keep_freed()
    try:
        with shown_progress() as progress:
            report = run_sweep(found, **told, progress=progress)
    except FailedRunsError as error:
        if error.report is not None:
            _show(error.report, told["folder"], json=json)
        raise
    _show(report, told["folder"], json=json)
    conditions = found.base.evaluate.fail_if
    if conditions and not any(run.passes for run in report.runs):
        quoted = " and ".join(f'"{one}"' for one in conditions)
        raise GateError(
            f"No run of the sweep passes {quoted}: the smallest losses are in {told['folder'] / 'sweep.md'}."
        )


def _show(report: SweepReport, folder: Path, *, json: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from modelzip.evaluation.sweep_report import sweep_json, sweep_table

    from .output import write, write_rich

    if json:
        write(sweep_json(report).decode())
        return
    header, rows = sweep_table(report)
    lines = [*report.answer, *(f"left out: {one.reason}" for one in report.skipped)]
    table = Table(header[0], title="Sweep", title_justify="left")
    for heading in header[1:-1]:
        table.add_column(heading, justify="right")
    table.add_column(header[-1])
    for row in rows:
        table.add_row(*map(Text, row))
    write_rich(table, *map(Text, lines), Text(f"output: {folder}, with sweep.md and sweep.html"))
