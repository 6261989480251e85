"""The plan of one stage: everything that can be known from headers and the meta device, before a weight is read."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from modelzip.checkpoints.blocks import Linear, Structure, find_structure, skeleton
from modelzip.checkpoints.errors import CheckpointError, MachineError, Problems
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.compressors.quantize.methods import METHODS
from modelzip.compressors.quantize.settings import QuantizeSettings
from modelzip.kernels.bitpack import packed_words
from modelzip.recipes.match import settings_for, unmatched
from modelzip.recipes.schema import Recipe, Stage
from modelzip.weights.layouts import COMPRESSED_TENSORS, MODELZIP, Scheme, decoder, portable, stored_scheme

BASE_BYTES: Final = 420 << 20
"""Python, torch and transformers in memory."""

SMALLEST_GROUP: Final = 16
"""Group sizes that replace one that doesn't divide are powers of two from here up: the ones that engines take."""


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
    """One stage, checked. Sizes are of all weights, in bytes; memory and disk are what the run will need."""

    source: str
    output: Path
    modules: tuple[ModulePlan, ...]
    schemes: Mapping[str, Scheme]
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
    """A plan for each stage, the later ones on what the earlier ones leave. Raises Problems with all that is wrong,
    CheckpointError if the model can't be compressed, MachineError if memory or disk don't suffice."""
    model = skeleton(checkpoint)
    names = NameMap(model, checkpoint)
    structure = find_structure(model, checkpoint, names=names)
    done = _compressed_already(checkpoint, structure, names)
    before = checkpoint.nbytes
    plans: list[Plan] = []
    problems: list[str] = []
    for number, stage in enumerate(recipe.stages):
        where = f"stages[{number}].{stage.kind}" if len(recipe.stages) > 1 else stage.kind
        modules = _modules(stage, structure, checkpoint, done=done, where=where, problems=problems)
        done = {**done, **{module.name: _scheme(module) for module in modules}}
        after = before - sum(m.bytes_before for m in modules) + sum(m.bytes_after for m in modules)
        layout, layout_note = _layout(stage, done, structure, where=where, problems=problems)
        needs_data = any(METHODS[type(module.settings)].hessian for module in modules)
        plan = Plan(
            source=checkpoint.source,
            output=output,
            modules=tuple(modules),
            schemes=done,
            layout=layout,
            bytes_before=before,
            bytes_after=after,
            memory_bytes=_memory(recipe, checkpoint, structure, model.config, needs_data=needs_data),
            disk_bytes=after,
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
        raise Problems(problems)
    return plans


def check_machine(plan: Plan) -> None:
    """Raise MachineError if the disk or the memory that the plan needs isn't there."""
    parent = next(folder for folder in (plan.output.absolute(), *plan.output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < plan.disk_bytes:
        raise MachineError(
            f"The output needs {plan.disk_bytes / 1e6:,.0f} MB and {parent} has {free / 1e6:,.0f} MB free: "
            "make room, or name another place with --output."
        )
    available = psutil.virtual_memory().available
    if available < plan.memory_bytes:
        raise MachineError(
            f"This needs about {plan.memory_bytes / 1e6:,.0f} MB of memory and {available / 1e6:,.0f} MB are free: "
            "lower --samples, --seq-len or --batch-size, or free memory."
        )


def _compressed_already(checkpoint: Checkpoint, structure: Structure, names: NameMap) -> dict[str, Scheme]:
    """Linears that are compressed in the input, with their schemes. Raises CheckpointError for foreign layouts."""
    config = checkpoint.quantization
    if config is None:
        return {}
    done = {}
    try:
        decoder(config)
        for linear in (linear for block in structure.blocks for linear in block.linears):
            shapes = {suffix: checkpoint.tensors[name].shape for suffix, name in names.parts(linear.name).items()}
            if shapes:
                done[linear.name] = stored_scheme(config, linear.name, shapes, linear.shape[1])
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
    done: Mapping[str, Scheme],
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
        fitted, note = _fit_group(settings, linear.shape[1])
        if note and settings.strict_groups:
            misfits.append(f"{linear.name} has {linear.shape[1]} columns")
        before = checkpoint.tensors[linear.tensor].nbytes
        after = _bytes(linear, fitted, checkpoint)
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
        problems.append(
            f"{where}: {again[0]}{_others(again)} is already quantized: give the original model, or leave what is "
            "compressed out with --ignore."
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
        elsewhere = unmatched_but_known(pattern, left_alone, stage)
        if elsewhere:
            if pattern not in stage.ignore:
                sentences.append(
                    f"{where}: the rule {pattern!r} matches only {elsewhere}, which is never compressed "
                    f"({left_alone[elsewhere]})."
                )
        else:
            sentences.append(
                f"{where}: the pattern {pattern!r} matches no module; modules are named like {linears[0]}."
            )
    return sentences


def unmatched_but_known(pattern: str, left_alone: Iterable[str], stage: Stage) -> str | None:
    """The first of the modules that are left alone anyway which the pattern names."""
    from modelzip.recipes.match import matches

    return next((name for name in left_alone if matches(pattern, name)), None)


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _fit_group(settings: QuantizeSettings, columns: int) -> tuple[QuantizeSettings, str]:
    """The settings with a group size that divides the columns, and what was changed."""
    size = settings.group_size
    if not isinstance(size, int) or columns % size == 0:
        return settings, ""
    fitting = [
        1 << power for power in range(4, 16) if SMALLEST_GROUP <= 1 << power < size and columns % (1 << power) == 0
    ]
    chosen: int | str = max(fitting) if fitting else "channel"
    return settings.model_copy(update={"group_size": chosen}), f"group {size} doesn't divide {columns} columns"


def _scheme(module: ModulePlan) -> Scheme:
    size = module.settings.group_size
    if isinstance(size, int) and size < module.shape[1]:
        return Scheme(module.bits, "group", size, module.settings.symmetric)
    strategy = "tensor" if size == "tensor" and module.shape[0] > 1 else "channel"
    return Scheme(module.bits, strategy, None, module.settings.symmetric)


def _bytes(linear: Linear, settings: QuantizeSettings, checkpoint: Checkpoint) -> int:
    """Bytes of the packed weight, scales, zero points and shape."""
    rows, columns = linear.shape
    info = checkpoint.tensors[linear.tensor]
    scale_bytes = min(4, info.nbytes // (rows * columns))
    size = settings.group_size
    groups = columns // size if isinstance(size, int) else 1
    scales = 1 if size == "tensor" else rows * groups
    zeros = 0
    if not settings.symmetric:
        zeros = 1 if size == "tensor" else 4 * packed_words(rows, settings.bits) * groups
    return 4 * rows * packed_words(columns, settings.bits) + scales * scale_bytes + zeros + 16


def _layout(
    stage: Stage, done: Mapping[str, Scheme], structure: Structure, *, where: str, problems: list[str]
) -> tuple[str, list[str]]:
    transposed = any(linear.transposed for block in structure.blocks for linear in block.linears if linear.name in done)
    holds = portable(done.values(), transposed=transposed)
    asked = stage.settings.layout
    if asked == COMPRESSED_TENSORS and not holds:
        problems.append(
            f"{where}: compressed-tensors holds 2, 4 and 8 bits in plain linears only; leave out --layout, or choose "
            "modelzip."
        )
    if asked != "auto":
        return asked, []
    if holds:
        return COMPRESSED_TENSORS, []
    return MODELZIP, ["the result is written in modelzip's own layout: opening it needs `import modelzip.weights`"]


def _memory(recipe: Recipe, checkpoint: Checkpoint, structure: Structure, config: Any, *, needs_data: bool) -> int:
    """Bytes the run will need: the interpreter, the largest block in fp32 twice, and what waiting batches hold."""
    blocks = [sum(4 * l.shape[0] * l.shape[1] for l in block.linears) for block in structure.blocks]
    widest = max((max(l.shape) for block in structure.blocks for l in block.linears), default=0)
    rest = max((info.nbytes for info in checkpoint.tensors.values()), default=0)
    needed = BASE_BYTES + 2 * max(blocks, default=0) + rest + 12 * widest * widest
    if needs_data:
        tokens = recipe.calibration.samples * recipe.calibration.seq_len
        element = 2 if checkpoint_dtype(checkpoint) != torch.float32 else 4
        width = config.get_text_config().hidden_size
        needed += (
            tokens * element * (6 * width + widest)
            + 12 * recipe.calibration.batch_size * recipe.calibration.seq_len * widest
        )
    return needed


def checkpoint_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type that most of the checkpoint's weights are stored in."""
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    floats = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    known = {dtype: size for dtype, size in sizes.items() if dtype in floats}
    return floats[max(known, key=known.__getitem__)] if known else torch.float32


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
