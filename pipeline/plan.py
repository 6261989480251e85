"""The plan of one stage: everything that can be known from headers and the meta device, before a weight is read."""

from __future__ import annotations

import difflib
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modelzip.checkpoints.blocks import Linear, Structure, find_structure, skeleton
from modelzip.checkpoints.errors import CheckpointError, ProblemsError
from modelzip.checkpoints.index import DTYPES, Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.compressors.quantize.methods import METHODS
from modelzip.compressors.quantize.settings import QuantizeSettings
from modelzip.recipes.match import matches, settings_for, unmatched
from modelzip.recipes.schema import Recipe, Stage
from modelzip.weights.layouts import COMPRESSED_TENSORS, MODELZIP, decoder, stored

from .grids import fit_group, meta_of, packed_bytes
from .portable import choose_layout
from .room import memory_needed


@dataclass(frozen=True)
class ModulePlan:
    """What is to become of one linear. shape: (out, in). Sizes in bytes, scales and zero points counted."""

    name: str
    method: str
    bits: int
    group: int | str
    shape: tuple[int, int]
    bytes_before: int
    bytes_after: int
    note: str
    settings: QuantizeSettings
    linear: Linear


@dataclass(frozen=True)
class Plan:
    """One stage, checked. Sizes are of all weights, in bytes; memory and disk are what the run will need.

    A later stage's disk holds what the one before it wrote, too.
    """

    source: str
    output: Path
    modules: tuple[ModulePlan, ...]
    metas: Mapping[str, Mapping[str, Any]]
    layout: str
    bytes_before: int
    bytes_after: int
    memory_bytes: int
    disk_bytes: int
    needs_data: bool
    propagate: str
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as `--dry-run --json` prints it."""
        modules = [
            {**asdict(replace(module, settings=None, linear=None)), "settings": module.settings.model_dump()}  # type: ignore[arg-type]
            for module in self.modules
        ]
        for module in modules:
            del module["linear"]
        keys = ("source", "layout", "bytes_before", "bytes_after", "memory_bytes", "disk_bytes")
        plain = {key: getattr(self, key) for key in keys}
        return {**plain, "output": str(self.output), "notes": list(self.notes), "modules": modules}


def make_plans(recipe: Recipe, checkpoint: Checkpoint, *, output: Path) -> list[Plan]:
    """A plan for each stage, the later ones on what the earlier ones leave. Raises ProblemsError with all mistakes,
    CheckpointError if the model can't be compressed. Whether the machine has room: `room.check_machine`."""
    model = skeleton(checkpoint)
    names = NameMap(model, checkpoint)
    structure = find_structure(model, checkpoint, names=names)
    in_input = done = _compressed_already(checkpoint, structure, names)
    before = checkpoint.nbytes
    plans: list[Plan] = []
    problems: list[str] = []
    for number, stage in enumerate(recipe.stages):
        where = f"stages[{number}].{stage.kind}" if len(recipe.stages) > 1 else stage.kind
        modules = _modules(stage, structure, checkpoint, done=done, in_input=in_input, where=where, problems=problems)
        done = {**done, **{module.name: meta_of(module.settings, module.linear, checkpoint) for module in modules}}
        after = before - sum(m.bytes_before for m in modules) + sum(m.bytes_after for m in modules)
        layout, layout_note = _layout(
            stage, done, structure, checkpoint=checkpoint, names=names, where=where, problems=problems
        )
        needs_data = any(METHODS[type(module.settings)].hessian for module in modules)
        plan = Plan(
            source=checkpoint.source,
            output=output,
            modules=tuple(modules),
            metas=done,
            layout=layout,
            bytes_before=before,
            bytes_after=after,
            memory_bytes=memory_needed(recipe, checkpoint, structure, model.config, needs_data=needs_data),
            disk_bytes=after + (before if number else 0),
            needs_data=needs_data,
            propagate=getattr(stage.settings, "propagate", "compressed"),
            notes=(*layout_note, *_notes(structure, modules)),
        )
        if modules and after >= before:
            problems.append(
                f"{where}: the output ({after:,} bytes) would not be smaller than the input ({before:,} bytes); "
                "take fewer bits or larger groups."
            )
        plans.append(plan)
        before = after
    if problems:
        raise ProblemsError(problems)
    return plans


def _compressed_already(checkpoint: Checkpoint, structure: Structure, names: NameMap) -> dict[str, dict[str, Any]]:
    """Linears that are compressed in the input, with what they are. Raises CheckpointError for foreign layouts."""
    config = checkpoint.quantization
    if config is None:
        return {}
    done = {}
    try:
        decoder(config)
        for linear in (linear for block in structure.blocks for linear in block.linears):
            infos = {suffix: checkpoint.tensors[name] for suffix, name in names.parts(linear.name).items()}
            parts = {s: torch.empty(i.shape, dtype=DTYPES[i.dtype], device="meta") for s, i in infos.items()}
            if parts:
                done[linear.name] = stored(config, linear.name, parts, linear.shape).meta()
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.source} is already {error}, which modelzip can't take as input: give the original model."
        ) from None
    return done


def _modules(
    stage: Stage,
    structure: Structure,
    checkpoint: Checkpoint,
    *,
    done: Mapping[str, Mapping[str, Any]],
    in_input: Container[str],
    where: str,
    problems: list[str],
) -> list[ModulePlan]:
    linears = [linear for block in structure.blocks for linear in block.linears]
    problems.extend(_patterns(stage, [linear.name for linear in linears], structure, where=where))
    modules: list[ModulePlan] = []
    again: list[str] = []
    misfits: list[str] = []
    for linear in linears:
        settings = settings_for(stage, linear.name)
        if settings is None:
            continue
        if linear.name in done:
            again.append(linear.name)
            continue
        fitted, note = fit_group(settings, linear.shape[1])
        if note and settings.strict_groups:
            misfits.append(f"{linear.name} has {linear.shape[1]} columns")
        before = checkpoint.tensors[linear.tensor].nbytes
        after = packed_bytes(linear, fitted, checkpoint)
        modules.append(
            ModulePlan(
                linear.name,
                fitted.method,
                fitted.bits,
                fitted.group_size,
                linear.shape,
                before,
                after,
                note,
                fitted,
                linear,
            )
        )
    if again:
        by_whom = "in the input" if again[0] in in_input else "by an earlier stage"
        problems.append(
            f"{where}: {again[0]}{_others(again)} is already quantized {by_whom}: give the original model, or leave "
            "what is compressed out with --ignore."
        )
    elif not modules:
        problems.append(f"{where}: nothing is left to compress: all {len(linears)} linears are ignored or skipped.")
    if misfits:
        problems.append(
            f"{where}: group_size {stage.settings.group_size} doesn't divide the columns of {len(misfits)} modules: "
            f"{misfits[0]}{_others(misfits)}; choose a divisor, or leave out --strict-groups."
        )
    return modules


def _patterns(stage: Stage, linears: list[str], structure: Structure, *, where: str) -> list[str]:
    left_alone = dict(structure.left_alone)
    sentences = []
    for pattern in unmatched(stage, linears):
        elsewhere = next((name for name in left_alone if matches(pattern, name)), None)
        if elsewhere:
            if pattern not in stage.ignore:
                sentences.append(
                    f"{where}: the rule {pattern!r} matches only {elsewhere}, which is never compressed "
                    f"({left_alone[elsewhere]})."
                )
        else:
            sentences.append(
                f"{where}: the pattern {pattern!r} matches no module; modules are named like "
                f"{_nearest(pattern, linears)}."
            )
    return sentences


def _nearest(pattern: str, linears: list[str]) -> str:
    """The first linear whose last name is most like the pattern's."""
    leaves = {name.rpartition(".")[2]: name for name in reversed(linears)}
    near = difflib.get_close_matches(pattern.rpartition(".")[2].strip("*$"), leaves, n=1)
    return leaves[near[0]] if near else linears[0]


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _layout(
    stage: Stage,
    done: Mapping[str, Mapping[str, Any]],
    structure: Structure,
    *,
    checkpoint: Checkpoint,
    names: NameMap,
    where: str,
    problems: list[str],
) -> tuple[str, list[str]]:
    layout, reason = choose_layout(stage.settings.layout, done, structure, checkpoint=checkpoint, names=names)
    if reason and layout == COMPRESSED_TENSORS:
        problems.append(f"{where}: {reason}; leave out --layout, or choose modelzip.")
    if layout == MODELZIP:
        why = f" ({reason})" if reason else ""
        return layout, [f"the result is in modelzip's own layout{why}: opening it needs `import modelzip.weights`"]
    return layout, []


def _notes(structure: Structure, modules: list[ModulePlan]) -> list[str]:
    changed = [module for module in modules if module.note]
    notes = []
    for note, group in sorted({(module.note, module.group) for module in changed}, key=str):
        count = sum(module.note == note and module.group == group for module in changed)
        taken = f"group {group}" if isinstance(group, int) else "one scale a row"
        notes.append(f"{note}: {taken} is taken for {count} of {len(modules)} modules")
    kinds: dict[str, list[str]] = {}
    for name, reason in structure.left_alone:
        kinds.setdefault(reason, []).append(name)
    notes += [f"left alone ({reason}): {names[0]}{_others(names)}" for reason, names in kinds.items()]
    return notes
