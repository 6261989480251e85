"""The plan of a layer-wise stage: everything that can be known from headers and the meta device, before a weight is
read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelzip.checkpoints.blocks import Structure, find_structure
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.checkpoints.skeleton import skeleton
from modelzip.recipes.match import settings_for
from modelzip.weights.layouts import COMPRESSED_TENSORS, MODELZIP, opened_dense
from modelzip.weights.value import CompressedWeight

from .bit_budget import WEIGHED, BitBudget, Foreseen, foreseen_bits, of_all_widths
from .blockwise import refusal, tuning_bytes
from .cache_plan import CachePlan, cache_obstacle, plan_cache
from .expert_plan import experts_note, with_experts
from .fold_plan import Folding, memory_held, plan_rotation, plan_scales
from .forms import described, expected, fitted, grouped, taken_group
from .layer_result import planned_result
from .module_plan import ModulePlan, looks_at_inputs, method_of, unshared, value_dtype
from .patterns import others, pattern_problems
from .portable import choose_layout
from .request import Request
from .room import BASE_BYTES, memory_needed
from .table_plan import plan_tables
from .target_size import sizer
from .weights_now import weights_now
from .whole import gradient_bytes

MEND = {
    "quantize": "take fewer bits or larger groups",
    "prune": "take a higher sparsity",
    "factorize": "take a smaller ratio",
}


@dataclass(frozen=True)
class LayerPlan:
    """See `plans.Plan`. weights: what every compressed module of the result will be, on the meta device.

    folding: what is changed across modules before they are compressed, None if nothing is. budget: where the bits of
    its modules are still to be chosen by measurement; those that they have are foreseen. takes_apart: experts are seen
    one by one (`checkpoints.unfused`). cache: of keys and values, None where they are cached as they are.
    """

    kind: str
    source: str
    output: Path
    modules: tuple[ModulePlan, ...]
    weights: Mapping[str, CompressedWeight]
    layout: str
    bytes_before: int
    bytes_after: int
    memory_bytes: int
    disk_bytes: int
    needs_data: bool
    propagate: str
    notes: tuple[str, ...]
    result: Checkpoint
    folding: Folding | None = None
    budget: BitBudget | None = None
    takes_apart: bool = False
    cache: CachePlan | None = None

    def rows(self) -> list[tuple[str, str, str, int, int, str]]:
        return [
            (m.name, m.settings.method, described(m.after), m.before.nbytes, m.after.nbytes, m.note)
            for m in self.modules
        ]

    def as_dict(self) -> dict[str, Any]:
        keys = ("kind", "source", "layout", "bytes_before", "bytes_after", "memory_bytes", "disk_bytes")
        plain = {key: getattr(self, key) for key in keys}
        modules = [
            {
                "name": module.name,
                "method": module.settings.method,
                "form": described(module.after),
                "shape": module.linear.shape,
                "bytes_before": module.before.nbytes,
                "bytes_after": module.after.nbytes,
                "note": module.note,
                "settings": module.settings.model_dump(),
            }
            for module in self.modules
        ]
        return {**plain, "output": str(self.output), "notes": list(self.notes), "modules": modules}


def plan_layers(request: Request) -> LayerPlan:
    """The plan of a layer-wise stage; what is wrong goes to `request.problems`.

    Raises CheckpointError if the model can't be compressed.
    """
    stage, before = request.stage, request.checkpoint.nbytes
    request = with_experts(request)
    apart = experts_note(request.checkpoint)
    folding, request = plan_rotation(request)
    checkpoint = request.checkpoint
    model = skeleton(checkpoint)
    names = NameMap(model, checkpoint)
    structure = find_structure(model, checkpoint, names=names)
    now = weights_now(checkpoint, structure, names)
    tables, left = plan_tables(stage, checkpoint, model, names=names, structure=structure)
    linears = [linear for block in structure.blocks for linear in block.linears]
    cache = plan_cache(request, names)
    added = 0 if cache is None else cache.nbytes
    foreseen = foreseen_bits(request, linears, now, tables, beside=added)
    modules, refused = _modules(request, structure, now, names, tables, foreseen)
    folding = plan_scales(folding, checkpoint, modules, names=names, structure=structure)
    weights = {name: weight for name, weight in now.items() if weight.kind != "dense"}
    weights |= {module.name: module.after for module in modules}
    after = checkpoint.nbytes - sum(m.before.nbytes for m in modules) + sum(m.after.nbytes for m in modules) + added
    forms = weights | of_all_widths(foreseen.budget, modules)
    layout, layout_note = _layout(request, forms, structure, names, cache)
    needs_data = _needs_data(modules, foreseen.budget, folding, cache)
    needed = memory_needed(request.recipe, checkpoint, structure, model.config, needs_data=needs_data)
    needed += memory_held(folding, checkpoint, modules, structure)
    needed += tuning_bytes(request.recipe, checkpoint, structure, model.config, modules)
    if modules and after >= before:
        request.problems.append(_growth(request, before, after))
    return LayerPlan(
        kind=stage.kind,
        source=checkpoint.source,
        output=request.output,
        modules=tuple(modules),
        weights=weights,
        layout=layout,
        bytes_before=before,
        bytes_after=after,
        memory_bytes=_memory(request, modules, foreseen.budget, needed),
        disk_bytes=after + request.disk_before,
        needs_data=needs_data,
        propagate=getattr(stage.settings, "propagate", "compressed"),
        notes=(
            *layout_note,
            *apart,
            *_cache_note(cache),
            *(folding.notes if folding else ()),
            *_notes(structure, modules, {**refused, **left}),
        ),
        result=planned_result(checkpoint, modules, weights, cache),
        folding=folding,
        budget=foreseen.budget,
        takes_apart=bool(apart),
        cache=cache,
    )


def _modules(
    request: Request,
    structure: Structure,
    now: Mapping[str, CompressedWeight],
    names: NameMap,
    tables: list[ModulePlan],
    foreseen: Foreseen,
) -> tuple[list[ModulePlan], dict[str, str]]:
    """The modules that the stage works on, tables first, and those that the method refuses, with the reason."""
    stage, where, problems = request.stage, request.where, request.problems
    linears = [linear for block in structure.blocks for linear in block.linears]
    sized = sizer(request, linears, now)
    named = [*(linear.name for linear in linears), *(table.name for table in tables)]
    problems.extend(pattern_problems(stage, named, structure, where=where))
    modules = list(tables)
    refused: dict[str, str] = {}
    misfits: list[str] = []
    for linear in linears:
        asked = settings_for(stage, linear.name)
        if asked is None:
            continue
        settings, note = fitted(sized(foreseen.settings(linear.name, asked)), linear.shape)
        if note and getattr(asked, "strict_groups", False):
            misfits.append("{} has {} {}".format(linear.name, *grouped(asked, linear.shape)))
        before = now[linear.name]
        after = expected(method_of(settings), before, settings, value_dtype(before))
        if isinstance(after, str):
            refused[linear.name] = after
            continue
        replaces = tuple(names.parts(linear.name).values()) or (linear.tensor,)
        planned = ModulePlan(linear.name, settings, before, after, note, linear, replaces)
        if reason := refusal(planned) or unshared(planned):
            refused[linear.name] = reason
            continue
        modules.append(planned)
    again = [name for name in refused if now[name].kind != "dense"]
    if again:
        problems.append(
            f"{where}: {again[0]}{others(again)}: {refused[again[0]]}; give the original model, or leave what is "
            "compressed out with --ignore."
        )
    elif not modules:
        why = f", the first, {next(iter(refused))}: {next(iter(refused.values()))}" if refused else ""
        problems.append(
            f"{where}: nothing is left to compress: all {len(linears)} linears are ignored, skipped or refused{why}."
        )
    if misfits:
        problems.append(
            f"{where}: group_size {stage.settings.group_size} doesn't divide {len(misfits)} modules: "
            f"{misfits[0]}{others(misfits)}; choose a divisor, or leave out --strict-groups."
        )
    return modules, {name: reason for name, reason in refused.items() if name not in again}


def _layout(
    request: Request,
    weights: Mapping[str, CompressedWeight],
    structure: Structure,
    names: NameMap,
    cache: CachePlan | None,
) -> tuple[str, list[str]]:
    asked = getattr(request.stage.settings, "layout", "auto")
    layout, reason = choose_layout(asked, weights, structure, checkpoint=request.checkpoint, names=names)
    if layout == COMPRESSED_TENSORS and not reason and cache is not None:
        made_dense = opened_dense([weight.meta() for weight in weights.values()])
        reason = cache_obstacle(cache, request.checkpoint, made_dense=made_dense)
        layout = MODELZIP if reason and asked == "auto" else layout
    if reason and layout == COMPRESSED_TENSORS:
        request.problems.append(f"{request.where}: {reason}; leave out --layout, or choose modelzip.")
    if layout == MODELZIP:
        why = f" ({reason})" if reason else ""
        return layout, [f"the result is in modelzip's own layout{why}: opening it needs `import modelzip.weights`"]
    return layout, []


def _growth(request: Request, before: int, after: int) -> str:
    """What is said of an output that takes no fewer bytes than the input."""
    return (
        f"{request.where}: the output ({after:,} bytes) would not be smaller than the input ({before:,} bytes); "
        f"{MEND[request.stage.kind]}."
    )


def _needs_data(
    modules: Sequence[ModulePlan], budget: BitBudget | None, folding: Folding | None, cache: CachePlan | None
) -> bool:
    """Whether anything of the stage asks for text."""
    looks = any(looks_at_inputs(module.settings) for module in modules)
    return looks or budget is not None or bool(folding and folding.scaled) or bool(cache and cache.is_new)


def _cache_note(cache: CachePlan | None) -> list[str]:
    return [] if cache is None or not cache.is_new else [cache.said()]


def _memory(request: Request, modules: Sequence[ModulePlan], budget: BitBudget | None, needed: int) -> int:
    """needed, with what some modules hold beside it; where bits are measured, at least what that takes."""
    needed += sum(_also_held(module) for module in modules)
    if budget is None:
        return needed
    kept = WEIGHED * sum(module.after.nbytes for module in modules)
    return max(needed, BASE_BYTES + kept + gradient_bytes(request.recipe, request.checkpoint, batch_size=1))


def _also_held(module: ModulePlan) -> int:
    """Memory in bytes for what an ordinary linear doesn't need: a table in fp32, or statistics of several layers."""
    rows, columns = module.linear.shape
    if module.is_table:
        return 8 * rows * columns
    is_pooled = module.linear.sharers and method_of(module.settings).statistic == "hessian"
    return 8 * columns * columns if is_pooled else 0


def _notes(structure: Structure, modules: list[ModulePlan], refused: Mapping[str, str]) -> list[str]:
    notes = []
    changed = [(module.note, taken_group(module.settings)) for module in modules if module.note]
    for note, taken in sorted(set(changed)):
        notes.append(f"{note}: {taken} is taken for {changed.count((note, taken))} of {len(modules)} modules")
    serving = [module for module in modules if module.linear.sharers and not module.is_table]
    if serving:
        notes.append(
            f"{len(serving)} matrices serve several layers: each is compressed once, for the inputs of all of them"
        )
    kinds: dict[str, list[str]] = {}
    planned = {name for module in modules for name in (module.name, *module.linear.sharers)}
    for name, reason in {**dict(structure.left_alone), **refused}.items():
        if name not in planned:
            kinds.setdefault(reason, []).append(name)
    notes += [f"left alone ({reason}): {names[0]}{others(names)}" for reason, names in kinds.items()]
    return notes
