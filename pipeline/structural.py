"""The structural engine: from a checkpoint to a smaller ordinary one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from modelzip.checkpoints.errors import CheckpointError, ProblemsError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.rewrite import expected, write
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.compressors.factorize.settings import Embedding, Share
from modelzip.compressors.prune.structural_settings import Heads, Layers, Neurons, Vocabulary
from modelzip.recipes.schema import Recipe, Stage

from .context import Context
from .identity import PROVENANCE
from .layer_pruning import LAYERS
from .narrowing import EMBEDDING
from .room import BASE_BYTES
from .sharing import SHARE
from .smaller import StructuralMethod, WholeSettings
from .text import Windows
from .unit_pruning import UNITS
from .vocabulary import VOCABULARY

METHODS: Final[Mapping[type[Any], StructuralMethod]] = MappingProxyType(
    {Heads: UNITS, Neurons: UNITS, Layers: LAYERS, Vocabulary: VOCABULARY, Share: SHARE, Embedding: EMBEDDING}
)
DONE: Final = {"prune": "pruned", "factorize": "factorized"}


@dataclass(frozen=True)
class StructuralPlan:
    """One structural stage, checked. Sizes in bytes; memory and disk are what the run will need.

    choice: what stays, as far as headers tell it. result: the checkpoint that will come out, to plan later stages on:
    its tensors can't be read. A later stage's disk holds what those before it wrote, too.
    """

    source: str
    output: Path
    kind: str
    settings: WholeSettings
    choice: Any
    result: Checkpoint
    bytes_before: int
    bytes_after: int
    memory_bytes: int
    disk_bytes: int
    needs_data: bool
    notes: tuple[str, ...]

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.settings.method

    def rows(self) -> list[tuple[str, str, str, int, int, str]]:
        """One for the whole model: name, method, form, bytes before and after, note."""
        return [("the whole model", self.settings.label, "", self.bytes_before, self.bytes_after, "")]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as `--dry-run --json` prints it."""
        keys = ("source", "kind", "method", "bytes_before", "bytes_after", "memory_bytes", "disk_bytes", "needs_data")
        plain = {key: getattr(self, key) for key in keys}
        settings = self.settings.model_dump(mode="json")
        return {**plain, "output": str(self.output), "settings": settings, "notes": list(self.notes)}


def plan_structural(
    stage: Stage,
    checkpoint: Checkpoint,
    *,
    recipe: Recipe,
    output: Path,
    where: str,
    problems: list[str],
    disk_before: int = 0,
) -> StructuralPlan | None:
    """The plan of a stage on `checkpoint`, of which only config and headers are read; it may be another plan's result.

    Mistakes are added to `problems`, each with `where` before it; None if there are any. disk_before: bytes of
    earlier stages' outputs.
    """
    settings = stage.settings
    found = [f"{where}: {sentence}" for sentence in _refused(stage)]
    method = METHODS[type(settings)]
    try:
        choice = method.first(settings, checkpoint)
        rewrite = method.build(settings, checkpoint, choice)
    except ProblemsError as error:
        found += [f"{where}: {sentence.rstrip('.')}." for sentence in error.sentences]
    except CheckpointError as error:
        found.append(f"{where}: {checkpoint.source} can't be {DONE[stage.kind]}: {str(error).rstrip('.')}.")
    if found:
        problems += found
        return None
    result = expected(rewrite, checkpoint)
    before, after = checkpoint.nbytes, result.nbytes
    if after >= before:
        problems.append(
            f"{where}: the output ({after:,} bytes) would not be smaller than the input ({before:,} bytes)."
        )
    return StructuralPlan(
        source=checkpoint.source,
        output=output,
        kind=stage.kind,
        settings=settings,
        choice=choice,
        result=result,
        bytes_before=before,
        bytes_after=after,
        memory_bytes=BASE_BYTES + method.memory(settings, checkpoint, recipe),
        disk_bytes=after + disk_before,
        needs_data=settings.needs_data,
        notes=method.notes(settings, rewrite),
    )


def _refused(stage: Stage) -> list[str]:
    patterns = [*stage.ignore, *(rule.match for rule in stage.rules)]
    if not patterns:
        return []
    return [f"{stage.settings.method} works on the model as a whole and takes no ignore and no rules: {patterns[0]!r}."]


def structural_fingerprint(context: Context, plan: StructuralPlan) -> str:
    """What a resumed stage must share with the interrupted one."""
    return f"{context.fingerprint}{plan.kind}{plan.settings.model_dump_json()}"


def run_structural(
    plan: StructuralPlan,
    source: Checkpoint,
    *,
    target: Path,
    windows: Windows | None,
    describe: Callable[[dict[str, Any]], bytes],
    overwrite: bool,
    resume: bool,
    context: Context,
) -> dict[str, Any]:
    """Make the smaller checkpoint and publish it at `target`; returns the record of each module, by its name.

    describe: makes modelzip.json from the records. A resumed run scores again, which gives the same choice, and goes on
    after the last block on disk. Raises what the writer and the method raise.
    """
    method = METHODS[type(plan.settings)]
    fingerprint = structural_fingerprint(context, plan)
    with CheckpointWriter.open(
        target, source=source, fingerprint=fingerprint, overwrite=overwrite, resume=resume
    ) as writer:
        begin = time.perf_counter()
        choice = plan.choice
        if method.choose is not None and not plan.settings.is_given:
            choice = method.choose(plan.settings, source, windows, context)
        begin = context.clock.add("score", begin)
        rewrite = method.build(plan.settings, source, choice)
        if method.fill is not None:
            method.fill(plan.settings, source, rewrite, writer, windows, context)
        write(rewrite, source, writer)
        fitted = {name: record for part in writer.done.values() for name, record in part["modules"].items()}
        records = {**rewrite.records, **fitted}
        files = {**rewrite.files, PROVENANCE: describe(records)}
        writer.finish(config=rewrite.config, files=files, left_out=rewrite.left_out)
        context.clock.add("write", begin)
    return records
