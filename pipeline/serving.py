"""Matrices that serve several modules: stored and compressed once, for the inputs of all of them.

The statistic of such a matrix is the mean over the tokens of every layer that uses it, as the original weights feed
them: a run of its own before the first is compressed, since the last of its layers comes long after the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from modelzip.checkpoints.blocks import Block, Linear
from modelzip.checkpoints.streamed import StreamedModel, start
from modelzip.weights.layouts import shared_parts

from .hessian import finish
from .inputs import InputSum, sums_of_inputs
from .module_plan import ModulePlan, method_of
from .solve import Statistic, statistic_of


def shared_after(
    before: Mapping[str, str], metas: Mapping[str, Mapping[str, Any]], linears: Iterable[Linear]
) -> dict[str, str]:
    """config.json's `shared` once matrices have these forms: their parts in place of their weights."""
    shared = dict(before)
    for linear in linears:
        if linear.name not in metas:
            continue
        for module in linear.sharers:
            mine = [name for name in shared if name.startswith(f"{module}.weight")]
            for name in mine:
                del shared[name]
            shared |= shared_parts(module, linear.name, metas[linear.name])
    return shared


def at_sharers(metas: Mapping[str, Any], linears: Iterable[Linear]) -> dict[str, Any]:
    """What is said of a matrix, said of all modules that use it."""
    found = dict(metas)
    for linear in linears:
        if linear.name in metas:
            found |= dict.fromkeys(linear.sharers, metas[linear.name])
    return found


def pooled_statistics(
    streamed: StreamedModel,
    batches: Sequence[Mapping[str, Tensor]],
    plans: Iterable[ModulePlan],
    *,
    spill_limit: int,
    spill_folder: Path | None,
) -> dict[str, Statistic]:
    """The statistics of matrices that serve several layers, by the name of the first. Gradients must be off."""
    owners = {
        module: plan
        for plan in plans
        if plan.linear.sharers and method_of(plan.settings).statistic != "none"
        for module in (plan.name, *plan.linear.sharers)
    }
    if not owners or not batches:
        return {}
    totals: dict[str, InputSum] = {}
    walk = streamed.walk(batches, spill_limit=spill_limit, spill_folder=spill_folder)
    blocks = streamed.structure.blocks
    last = max(number for number, block in enumerate(blocks) if _users(block, owners))
    try:
        start(walk, streamed)
        for block in blocks[: last + 1]:
            users = _users(block, owners)
            if not users:
                streamed.through(walk, block)
                continue
            streamed.load(block)
            whole = {name: statistic_of(owners[name]) == "hessian" for name in users}
            sums = sums_of_inputs(streamed, walk, block, whole)
            streamed.free(block)
            _add(totals, {name: (owners[name].name, found) for name, found in sums.items()})
    finally:
        walk.close()
    made: dict[int, Statistic] = {}
    for total in totals.values():
        if id(total) not in made:
            made[id(total)] = Statistic(finish(total.total, total.tokens), total.tokens, is_pooled=True)
    return {name: made[id(total)] for name, total in totals.items()}


def _users(block: Block, owners: Mapping[str, ModulePlan]) -> list[str]:
    return [name for name in (*(linear.name for linear in block.linears), *block.sharers) if name in owners]


def _add(totals: dict[str, InputSum], sums: Mapping[str, tuple[str, InputSum]]) -> None:
    """Add one layer's sums to those of the layers before; matrices with one input keep one total."""
    added = set()
    for owner, found in sums.values():
        total = totals.setdefault(owner, found)
        if total is not found and id(total) not in added:
            added.add(id(total))
            total.total += found.total
            total.tokens += found.tokens
