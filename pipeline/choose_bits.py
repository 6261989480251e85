"""The bits of each matrix, chosen by what every width of it would cost the model.

The calibration text is parted in two. With one part, the blocks are streamed and each matrix is compressed at every
width that it may get; the other, which no width was fitted to, says by how much more or less each width is off. On
that, with the whole model in memory, the errors of a few widths of each matrix are weighed by what they cost the output
(`cost_of_errors`). How roundings fall is chance, and falls otherwise in the run itself; so what a matrix costs is the
mean of those widths, each in proportion to its error. Losses are those of one matrix alone, everything else as in the
original. What is chosen then is the least sum for the size (`bit_choice`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.checkpoints.blocks import Block
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import load_whole
from modelzip.checkpoints.streamed import StreamedModel, start
from modelzip.checkpoints.walk import Walk
from modelzip.evaluation.bits_report import CHOICE
from modelzip.weights.value import CompressedWeight

from . import solve
from .bit_budget import WEIGHED, BitBudget, at_bits
from .bit_choice import Choice, Forms, chosen
from .context import Context
from .cost_of_errors import costs_of_errors
from .hessian import finish
from .inputs import InputSum, sums_of_inputs
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
class Tried:
    """One matrix at each width. input: as in `Forms`. errors: the mean square of what its outputs are off by, summed
    over outputs, where tokens arrive. squares: that of the matrix itself, summed up. made: it at some widths, those at
    which something is lost, by their numbers; empty where no token arrives."""

    input: str
    errors: tuple[float, ...]
    squares: tuple[float, ...]
    sizes: tuple[int, ...]
    made: Mapping[int, CompressedWeight]

    def forms(self, costs: Tensor) -> Forms:
        """costs: of the widths in `made`, in nats an output."""
        errors = torch.tensor([self.errors[width] for width in self.made], dtype=torch.float64)
        scale = float((costs / errors).clamp(min=1e-300).log().mean().exp())
        return Forms(self.input, tuple(scale * error for error in self.errors), self.sizes)

    def guessed(self, rate: float) -> Forms:
        """rate: what the square of an error costs in other matrices."""
        return Forms(self.input, tuple(rate * square for square in self.squares), self.sizes)


def all_forms(tried: Mapping[str, Tried], costs: Mapping[str, Tensor]) -> tuple[dict[str, Forms], int]:
    """What each width of each matrix costs, and how many are guessed.

    A matrix that no text reached on which errors are weighed, such as one of a rare expert, is taken to cost what the
    square of an error costs in the median matrix of its kind.
    """
    found = {name: one.forms(costs[name]) for name, one in tried.items() if name in costs}
    rates: dict[str, list[float]] = {}
    for name, forms in found.items():
        loss, square = forms.losses[0], tried[name].squares[0]
        for kind in (_kind(name), ""):
            rates.setdefault(kind, []).append(loss / square if square else 0.0)
    missing = [name for name in tried if name not in found]
    for name in missing:
        alike = rates.get(_kind(name)) or rates.get("") or [0.0]
        found[name] = tried[name].guessed(median(alike))
    return found, sum(any(tried[name].squares) for name in missing)


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


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
        near = near_widths(plans.values(), plan.budget)
        trial = _Trial(plan.budget, near, len(fitted_to), context.recipe.seed)
        tried = _try_all(trial, plans, streamed, streamed.walk([*fitted_to, *others], **spill), context)
        costs = _costs(plans, tried, streamed.checkpoint, others, context)
        forms, guessed = all_forms(tried, costs)
        if guessed:
            context.progress.say(
                f"{guessed} matrices that too little text reached are weighed like others of their kind"
            )
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
) -> dict[str, Tensor]:
    """What the errors of the widths that were kept cost."""
    model = load_whole(source, dtype=compute_dtype(context.recipe, source, context.device), device=context.device)
    lossy = {name: one.made for name, one in tried.items() if one.made}
    modules = {module: name for name in lossy for module in (name, *plans[name].linear.sharers)}
    generator = torch.Generator().manual_seed(context.recipe.seed)
    given = [{name: tensor.to(context.device) for name, tensor in text.items()} for text in texts]

    def errors(name: str) -> Iterator[Tensor]:
        stored: Tensor = model.get_submodule(name).weight.detach().float()
        weight = stored.T if plans[name].linear.transposed else stored
        return (made.dense(torch.float32).to(weight) - weight for made in lossy[name].values())

    def step(done: int) -> None:
        context.progress.step("gradients", done, len(given))

    return costs_of_errors(model, modules, errors, given, generator, step=step)


@dataclass(frozen=True)
class _Trial:
    """near: the numbers of the widths whose errors are weighed. fitted_to: how many batches, the first, matrices are
    compressed for; the others say how well."""

    budget: BitBudget
    near: frozenset[int]
    fitted_to: int
    seed: int


def _try_all(
    trial: _Trial, plans: Mapping[str, ModulePlan], streamed: StreamedModel, walk: Walk, context: Context
) -> dict[str, Tried]:
    """Each matrix at every width; the walk is used up."""
    found: dict[str, Tried] = {}
    blocks = streamed.structure.blocks
    last = max(n for n, block in enumerate(blocks) if any(one.name in plans for one in block.linears))
    try:
        start(walk, streamed)
        for number, block in enumerate(blocks[: last + 1]):
            context.progress.step("measure", number, last + 1, block.name)
            mine = {one.name: plans[one.name] for one in block.linears if one.name in plans}
            if mine:
                found |= _tried(trial, mine, streamed, walk, block)
            else:
                streamed.through(walk, block)
        context.progress.step("measure", last + 1, last + 1)
    finally:
        walk.close()
    return found


def near_widths(plans: Iterable[ModulePlan], budget: BitBudget) -> frozenset[int]:
    """The numbers of the width at which all matrices together come nearest to the budget (of 4 bits if it is no size),
    and of its neighbours."""
    widths = range(len(budget.candidates))
    if budget.nbytes is None:
        usual = min(widths, key=lambda width: abs(budget.candidates[width] - USUAL_BITS))
    else:
        nbytes, every = budget.nbytes, list(plans)
        sizes = [sum(at_bits(plan, bits).after.nbytes for plan in every) for bits in budget.candidates]
        usual = min(widths, key=lambda width: abs(sizes[width] - nbytes))
    return frozenset(width for width in widths if 2 * abs(width - usual) < WEIGHED)


def _tried(
    trial: _Trial, plans: Mapping[str, ModulePlan], streamed: StreamedModel, walk: Walk, block: Block
) -> dict[str, Tried]:
    """The matrices of one block, through which all batches run as it is."""
    streamed.load(block)
    wanted, count = dict.fromkeys(plans, True), trial.fitted_to
    sums = sums_of_inputs(streamed, walk, block, wanted, range(count))
    others = sums_of_inputs(streamed, walk, block, wanted, range(count, len(walk)))
    first = {id(one): name for name, one in reversed(sums.items())}  # the first linear that is handed the same tensor
    shared = {name: Statistic(_mean(sums[name]), sums[name].tokens) for name in first.values()}
    means = {id(one): _mean(one) for one in others.values()}  # linears that are handed the same tensor share one
    found = {}
    for name, plan in plans.items():
        key = first[id(sums[name])] if name in sums else name
        sizes = tuple(at_bits(plan, bits).after.nbytes for bits in trial.budget.candidates)
        weight = streamed.weight(name).float().contiguous()
        made = _widths(trial, plan, weight, shared.get(key), source=streamed.checkpoint)
        moment = means[id(others[name])] if name in others else None
        lost = [_lost(weight, one, moment) for one in made]
        errors, squares = (tuple(part) for part in zip(*lost, strict=True))
        lossy = [width for width, error in enumerate(errors) if error > 0]
        kept = [width for width in lossy if width in trial.near] or lossy[-1:]
        weights = {width: one for width in kept if (one := made[width]) is not None}
        found[name] = Tried(key, errors, squares, sizes, weights)
    streamed.free(block)
    return found


def _mean(one: InputSum) -> Tensor:
    return finish(one.total, one.tokens)


def _lost(weight: Tensor, made: CompressedWeight | None, moment: Tensor | None) -> tuple[float, float]:
    """tr(E M Eᵀ) and tr(E Eᵀ) of the error E [out, in]. moment: M, the mean of x xᵀ, None where no token arrives."""
    if made is None:
        return 0.0, 0.0
    error = weight - made.dense(torch.float32)
    weighed = 0.0 if moment is None else float(((error @ moment) * error).sum().clamp(min=0))
    return weighed, float(error.square().sum())


def _widths(
    trial: _Trial, plan: ModulePlan, weight: Tensor, statistic: Statistic | None, *, source: Checkpoint
) -> list[CompressedWeight | None]:
    """Weight [out, in] at each width; None where it is left as it is."""
    job = solve.Job(value_dtype(plan.before), None, trial.seed)
    now = stored_weight(plan, source)
    found = []
    for bits in trial.budget.candidates:
        settings = at_bits(plan, bits).settings
        found.append(solve.solve(plan.name, weight, now, settings=settings, statistic=statistic, job=job).weight)
    return found
