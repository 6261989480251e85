"""The bits of each matrix, chosen by what every width of it would cost the model.

The calibration text is parted in two. With one part, the blocks are streamed and each matrix is compressed at every
width that it may get, which says by how much more or less each width is off. With the other, which no width was fitted
to, and the whole model in memory, the error of one width of each matrix is weighed by what it costs the output
(`cost_of_errors`). A knapsack then finds the least loss for the size (or the least size for the loss), linears that
share an input taken as one, since engines fuse them.

Losses are those of one matrix alone, everything else as in the original, and are summed up.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.checkpoints.blocks import Block
from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import load_whole
from modelzip.checkpoints.streamed import StreamedModel, start
from modelzip.checkpoints.walk import Walk
from modelzip.compressors.quantize.allocate import frontier
from modelzip.evaluation.bits_report import CHOICE
from modelzip.weights.value import CompressedWeight

from . import solve
from .bit_budget import BitBudget, at_bits
from .context import Context
from .cost_of_errors import costs_of_errors
from .hessian import finish
from .inputs import sums_of_inputs
from .layer_plan import LayerPlan
from .matrices import stored_weight
from .module_plan import ModulePlan, value_dtype
from .solve import Statistic
from .whole import compute_dtype

SAMPLES = 16
"""Windows of the calibration text, at most, on which errors are weighed."""
USUAL_BITS: Final = 4
FILE: Final = "bits.json"


@dataclass(frozen=True)
class Choice:
    """bits: of each matrix. loss: what the choice is expected to cost, in nats an output (see `cost_of_errors`).
    nbytes: of these matrices. uniform: nbytes and loss of each width for all matrices."""

    bits: Mapping[str, int]
    loss: float
    nbytes: int
    uniform: Mapping[str, tuple[int, float]]

    def said(self) -> str:
        """A sentence for the progress."""
        counts = Counter(self.bits.values())
        shares = ", ".join(f"{bits} for {counts[bits]}" for bits in sorted(counts))
        near = min(self.uniform, key=lambda bits: abs(self.uniform[bits][0] - self.nbytes))
        size, loss = self.uniform[near]
        return (
            f"bits chosen: {shares} matrices; {self.nbytes / 1e6:,.2f} MB, expected loss {self.loss:.3g} nats "
            f"({near} bits for all: {size / 1e6:,.2f} MB, {loss:.3g})"
        )

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "matrices": {str(bits): count for bits, count in sorted(Counter(self.bits.values()).items())},
            "expected_loss": self.loss,
            "bytes": self.nbytes,
            "uniform": {bits: {"bytes": size, "expected_loss": loss} for bits, (size, loss) in self.uniform.items()},
        }


@dataclass(frozen=True)
class Forms:
    """What each width of one matrix would cost. input: the same for linears that are handed the same tensor."""

    input: str
    losses: tuple[float, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Tried:
    """One matrix at each width. input: as in `Forms`. errors: the mean square of what its outputs are off by, summed
    over outputs, where tokens arrive. made: it at the width number `at`, None where nothing is lost."""

    input: str
    errors: tuple[float, ...]
    sizes: tuple[int, ...]
    at: int
    made: CompressedWeight | None

    def forms(self, cost: float) -> Forms:
        """cost: of `made`, in nats an output."""
        scale = cost / self.errors[self.at] if self.made is not None else 0.0
        return Forms(self.input, tuple(scale * error for error in self.errors), self.sizes)


def settled(
    plan: LayerPlan,
    streamed: StreamedModel,
    data: Sequence[Mapping[str, Tensor]],
    *,
    work: Path,
    context: Context,
    spill: Mapping[str, Any],
) -> tuple[LayerPlan, dict[str, Any]]:
    """The plan with the bits that were chosen, and a record of that; without a budget the plan as it is.

    data: the calibration text, batch by batch. work: the folder in which a killed run leaves its choice. spill: where
    waiting batches go, see `Walk`. Gradients must be off. Raises RecipeError for a max_kl that can't be reached.
    """
    if plan.budget is None:
        return plan, {}
    plans = {module.name: module for module in plan.modules if module.name in plan.budget.names}
    file = work / FILE
    if file.is_file():
        choice = Choice(**json.loads(file.read_text()))
    else:
        fitted_to, others = parted(data)
        tried = _try_all(plans, plan.budget, streamed, streamed.walk(fitted_to, **spill), context)
        costs = _costs(plans, tried, streamed.checkpoint, others, context)
        forms = {name: one.forms(costs.get(name, 0.0)) for name, one in tried.items()}
        choice = chosen(forms, plan.budget)
        _keep(file, choice)
    context.progress.say(choice.said())
    modules = (at_bits(one, choice.bits[one.name]) if one.name in choice.bits else one for one in plan.modules)
    return replace(plan, modules=tuple(modules)), {CHOICE: choice.record()}


def _keep(file: Path, choice: Choice) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.partial")
    draft.write_text(json.dumps(asdict(choice)))
    os.replace(draft, file)


def parted(
    data: Sequence[Mapping[str, Tensor]],
) -> tuple[list[Mapping[str, Tensor]], list[Mapping[str, Tensor]]]:
    """The batches that widths are fitted to, and texts one by one, at most half of all, that errors are weighed on.

    A single text serves for both.
    """
    texts: list[Mapping[str, Tensor]] = [
        {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for batch in data
        for row in range(len(next(iter(batch.values()))))
    ]
    count = min(SAMPLES, len(texts) // 2)
    if count == 0:
        return list(data), texts
    left = len(texts) - count
    kept: list[Mapping[str, Tensor]] = []
    for batch in data:
        size = min(left, len(next(iter(batch.values()))))
        if size:
            kept.append({name: tensor[:size] for name, tensor in batch.items()})
        left -= size
    return kept, texts[-count:]


def _costs(
    plans: Mapping[str, ModulePlan],
    tried: Mapping[str, Tried],
    source: Checkpoint,
    texts: Sequence[Mapping[str, Tensor]],
    context: Context,
) -> dict[str, float]:
    """What the errors of the widths that were kept cost."""
    model = load_whole(source, dtype=compute_dtype(context.recipe, source, context.device), device=context.device)
    lossy = {name: one.made for name, one in tried.items() if one.made is not None}
    modules = {module: name for name in lossy for module in (name, *plans[name].linear.sharers)}
    generator = torch.Generator().manual_seed(context.recipe.seed)
    given = [{name: tensor.to(context.device) for name, tensor in text.items()} for text in texts]

    def error(name: str) -> Tensor:
        weight: Tensor = model.get_submodule(name).weight.detach().float()
        return lossy[name].dense(torch.float32).to(weight) - (weight.T if plans[name].linear.transposed else weight)

    def step(done: int) -> None:
        context.progress.step("gradients", done, len(given))

    return costs_of_errors(model, modules, error, given, generator, step=step)


def _try_all(
    plans: Mapping[str, ModulePlan], budget: BitBudget, streamed: StreamedModel, walk: Walk, context: Context
) -> dict[str, Tried]:
    """Each matrix at every width; the walk is used up."""
    found: dict[str, Tried] = {}
    blocks = streamed.structure.blocks
    at = usual_width(plans.values(), budget)
    last = max(n for n, block in enumerate(blocks) if any(one.name in plans for one in block.linears))
    try:
        start(walk, streamed)
        for number, block in enumerate(blocks[: last + 1]):
            context.progress.step("measure", number, last + 1, block.name)
            mine = {one.name: plans[one.name] for one in block.linears if one.name in plans}
            if mine:
                found |= _tried(mine, budget, streamed, walk, block, at=at, seed=context.recipe.seed)
            else:
                streamed.through(walk, block)
        context.progress.step("measure", last + 1, last + 1)
    finally:
        walk.close()
    return found


def usual_width(plans: Iterable[ModulePlan], budget: BitBudget) -> int:
    """The number of the width at which all matrices together come nearest to the budget; of 4 bits if it is no size."""
    widths = range(len(budget.candidates))
    if budget.nbytes is None:
        return min(widths, key=lambda width: abs(budget.candidates[width] - USUAL_BITS))
    nbytes, every = budget.nbytes, list(plans)
    sizes = [sum(at_bits(plan, bits).after.nbytes for plan in every) for bits in budget.candidates]
    return min(widths, key=lambda width: abs(sizes[width] - nbytes))


def _tried(
    plans: Mapping[str, ModulePlan],
    budget: BitBudget,
    streamed: StreamedModel,
    walk: Walk,
    block: Block,
    *,
    at: int,
    seed: int,
) -> dict[str, Tried]:
    """The matrices of one block, through which all batches run as it is."""
    streamed.load(block)
    sums = sums_of_inputs(streamed, walk, block, dict.fromkeys(plans, True))
    first = {id(one): name for name, one in reversed(sums.items())}  # the first linear that is handed the same tensor
    shared = {
        name: Statistic(finish(sums[name].total, sums[name].tokens), sums[name].tokens) for name in first.values()
    }
    found = {}
    for name, plan in plans.items():
        key = first[id(sums[name])] if name in sums else name
        weight = streamed.weight(name).float().contiguous()
        made = _widths(plan, budget, weight, shared.get(key), source=streamed.checkpoint, seed=seed)
        sizes = tuple(at_bits(plan, bits).after.nbytes for bits in budget.candidates)
        errors = tuple(error for error, _ in made) or (0.0,) * len(sizes)
        lossy = [width for width, error in enumerate(errors) if error > 0]
        kept = at if at in lossy else max(lossy, default=at)
        found[name] = Tried(key, errors, sizes, kept, made[kept][1] if lossy else None)
    streamed.free(block)
    return found


def _widths(
    plan: ModulePlan,
    budget: BitBudget,
    weight: Tensor,
    statistic: Statistic | None,
    *,
    source: Checkpoint,
    seed: int,
) -> list[tuple[float, CompressedWeight | None]]:
    """Weight [out, in] at each width, with its error (see `Tried`); empty where no token arrives: nothing is lost."""
    if statistic is None or statistic.hessian is None:
        return []
    job = solve.Job(value_dtype(plan.before), None, seed)
    now = stored_weight(plan, source)
    found = []
    for bits in budget.candidates:
        settings = at_bits(plan, bits).settings
        made = solve.solve(plan.name, weight, now, settings=settings, statistic=statistic, job=job).weight
        lost = weight - (weight if made is None else made.dense(torch.float32))
        found.append((float(((lost @ statistic.hessian) * lost).sum().clamp(min=0)), made))
    return found


def chosen(forms: Mapping[str, Forms], budget: BitBudget) -> Choice:
    """The best choice within the budget. Raises RecipeError for a max_kl that can't be reached."""
    groups: dict[str, list[str]] = {}
    for name, one in forms.items():
        groups.setdefault(one.input, []).append(name)
    widths = range(len(budget.candidates))
    losses = [[sum(forms[name].losses[w] for name in names) for w in widths] for names in groups.values()]
    sizes = [[sum(forms[name].sizes[w] for name in names) for w in widths] for names in groups.values()]
    ways = frontier(losses, sizes)
    if budget.nbytes is not None:
        taken = ways.within(budget.nbytes)
        assert taken is not None, "the plan has found that it can be reached"
    else:
        assert budget.max_kl is not None
        taken = ways.below(budget.max_kl)
        if taken is None:
            raise RecipeError(
                f"max_kl {budget.max_kl:g} can't be reached: all matrices at {max(budget.candidates)} bits are expected"
                f" to cost {sum(row[-1] for row in losses):.3g} nats a token; ask for more."
            )
    bits = {
        name: budget.candidates[width] for names, width in zip(groups.values(), taken, strict=True) for name in names
    }
    loss = sum(row[width] for row, width in zip(losses, taken, strict=True))
    nbytes = sum(row[width] for row, width in zip(sizes, taken, strict=True))
    uniform = {
        str(b): (sum(row[w] for row in sizes), sum(row[w] for row in losses)) for w, b in enumerate(budget.candidates)
    }
    return Choice(bits, loss, nbytes, uniform)
