"""The folders of a chain: where its stages are kept, what an earlier run has left there, and what goes at the end."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelzip.checkpoints.errors import OutputError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.journal import started_for
from modelzip.checkpoints.target import check_target, partial_of
from modelzip.recipes.load import recipe_data
from modelzip.recipes.schema import Recipe

from .identity import NOT_IN_THE_BYTES, provenance_in

if TYPE_CHECKING:  # a Run holds plans, which are made with the help of this
    from .context import Run


def folder_problems(recipe: Recipe, checkpoint: Checkpoint, output: Path) -> list[str]:
    """Sentences about stages that are to be kept where something else lies or will lie."""
    taken = {"the model": checkpoint.folder.resolve(), "the output": _real(output)}
    problems = []
    for number, stage in enumerate(recipe.stages):
        if stage.output is None:
            continue
        where = f"stages[{number}].{stage.kind}: output"
        folder = _real(Path(stage.output))
        for other, place in taken.items():
            if folder == place or folder in place.parents or place in folder.parents:
                problems.append(f"{where}: {stage.output} and {other} ({place}) overlap; name another folder.")
        taken[f"what stages[{number}] is kept as"] = folder
    return problems


def check_left(run: Run, fingerprints: Sequence[str], *, overwrite: bool, resume: bool) -> None:
    """Raise OutputError if the places of the stages before the last hold something that this run may not go on with.

    fingerprints: of those stages.
    """
    for number, (fingerprint, target) in enumerate(zip(fingerprints, run.targets[:-1], strict=True)):
        is_there = target.is_dir() and any(target.iterdir())
        journal = started_for(partial_of(target))
        if overwrite:
            check_target(target, overwrite=True)
            continue
        if is_there:
            _check_finished(run, number, target, resume=resume)
        if journal is not None and not resume:
            raise _interrupted(run, partial_of(target))
        if journal is not None and journal != fingerprint:
            raise _other_recipe(run, partial_of(target), None)


def _check_finished(run: Run, number: int, target: Path, *, resume: bool) -> None:
    data = provenance_in(target)
    if data.get("fingerprint") == run.context.fingerprint:
        if not resume:
            raise _interrupted(run, target)
    elif target in run.passing:
        raise _other_recipe(run, target, data.get("recipe")) if resume else _interrupted(run, target)
    else:
        raise OutputError(
            f"The folder {target}, which stages[{number}] is to be kept as, exists already and isn't of this run; give "
            "--overwrite to replace it, or name another."
        )


def _interrupted(run: Run, folder: Path) -> OutputError:
    return OutputError(
        f"An interrupted run for {run.output} has left {folder}; give --resume to go on with it, or --overwrite "
        "to start again."
    )


def _other_recipe(run: Run, folder: Path, recipe: Any) -> OutputError:
    changes = _differences(recipe, recipe_data(run.context.recipe)) if isinstance(recipe, dict) else iter(())
    told = next((f" ({change})" for change in changes), "")
    return OutputError(
        f"The interrupted run for {run.output}, which has left {folder}, was of another recipe, model or version{told};"
        " give --overwrite to start again, or name another output."
    )


def _differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """What has changed in a recipe, as sentences' parts."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in (*now, *(key for key in before if key not in now)):
            if path or key not in NOT_IN_THE_BYTES:
                yield from _differences(before.get(key), now.get(key), f"{path}.{key}".removeprefix("."))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{path}[{number}]")
    elif before != now:
        yield f"{path} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    if isinstance(value, list | Mapping):
        return f"{len(value)} long"
    return "not given" if value is None else str(value)


def sweep(run: Run) -> None:
    """Remove what a chain keeps only until it is done, also what an earlier one with more stages has left."""
    whole = Path(os.path.abspath(run.output))
    passing = re.compile(rf"\.{re.escape(whole.name)}\.stage\d+|\.\.{re.escape(whole.name)}\.stage\d+\.(partial|old)")
    for folder in whole.parent.iterdir():
        if passing.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)
    memory_file(run).unlink(missing_ok=True)


def memory_file(run: Run) -> Path:
    """The hidden file beside the output that keeps what was measured of earlier stages, until the run is done."""
    whole = Path(os.path.abspath(run.output))
    return whole.with_name(f".{whole.name}.measured.json")


def _real(path: Path) -> Path:
    return path.expanduser().resolve()
