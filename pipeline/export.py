"""The recipe's list `export`: what a run writes beside its output when all else is done."""

from __future__ import annotations

from pathlib import Path

from modelzip.checkpoints.errors import ProblemsError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.target import check_target, partial_of
from modelzip.exporters.formats import export, refusal
from modelzip.exporters.request import request_of
from modelzip.recipes.export_formats import AUTO
from modelzip.recipes.naming import export_output
from modelzip.recipes.schema import Export, Recipe

from .exported import check_export, said
from .identity import read_provenance
from .progress import Progress


def check_exports(
    recipe: Recipe, planned: Checkpoint, output: Path, *, fingerprint: str, overwrite: bool, resume: bool
) -> None:
    """Raise an error, before any work is done, if an export may not be written to its folder, or can't hold the result.

    planned: the headers that the last stage will leave.
    """
    folders = [_folder(one, output) for one in recipe.export]
    refusals = (
        refusal(request_of(one, planned, folder, overwrite=overwrite), one.format)
        for one, folder in zip(recipe.export, folders, strict=True)
        if not _needless(one, planned)
    )
    if problems := [f"export: {refusal}" for refusal in refusals if refusal is not None]:
        raise ProblemsError(problems)
    twice = {str(folder) for folder in folders if folders.count(folder) > 1 or folder == output}
    if twice:
        raise ProblemsError(
            [f"{folder} is named for two outputs: give each export its own." for folder in sorted(twice)]
        )
    for folder in folders:
        if resume and _is_finished(folder, fingerprint):
            continue
        check_target(folder, overwrite=overwrite, has_partial=partial_of(folder).exists())


def export_all(
    recipe: Recipe, output: Path, fingerprint: str, *, overwrite: bool, resume: bool, progress: Progress
) -> list[Path]:
    """Write every export of the finished `output` and open each; one that would change nothing is left out, and said.

    With `resume`, those that this run (by its fingerprint) has finished before are left as they are.
    """
    result = Checkpoint.open(str(output))
    written = []
    for one in recipe.export:
        if _needless(one, result):
            progress.say(f"export: {output} is {one.format} already, so it isn't exported")
            continue
        folder = _folder(one, output)
        if resume and not overwrite and _is_finished(folder, fingerprint):
            progress.say(f"export: {folder} is finished already")
            continue
        progress.say(f"export: writing {folder}")
        done = export(request_of(one, result, folder, overwrite=overwrite), one.format)
        for line in (*done.rounded, *done.notes):
            progress.say(f"export: {line}")
        if one.verify:
            progress.say(f"export: {folder}: {said(check_export(result, one.format, done, seed=recipe.seed))}")
        written.append(done.path)
    return written


def _needless(one: Export, result: Checkpoint) -> bool:
    """Whether the result is in this format as it is."""
    kind = (result.quantization or {}).get("quant_method", "dense")
    return one.format == kind and one.scheme == one.dtype == AUTO


def _is_finished(folder: Path, fingerprint: str) -> bool:
    """Whether the folder holds an export of this run: modelzip.json is carried along."""
    return read_provenance(folder, fingerprint) is not None


def _folder(one: Export, output: Path) -> Path:
    return Path(one.output).expanduser() if one.output else export_output(output, one.format)
