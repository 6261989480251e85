"""The plan of a stage whose bits are chosen by measurement: what there is to choose from, and what headers foresee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from modelzip.checkpoints.blocks import Linear
from modelzip.compressors.quantize.allocate import frontier
from modelzip.compressors.quantize.settings_budget import BudgetSettings
from modelzip.compressors.settings import MethodSettings
from modelzip.recipes.match import settings_for
from modelzip.weights.value import CompressedWeight

from .forms import expected, fitted
from .module_plan import ModulePlan, method_of, value_dtype
from .request import Request

WEIGHED: Final = 3
"""Widths of a matrix, at most, whose errors are weighed: the usual one and its neighbours."""


@dataclass(frozen=True)
class BitBudget:
    """What a stage's matrices may cost together. nbytes: of those named; None where max_kl says how many. candidates:
    the bits that each may get."""

    names: frozenset[str]
    candidates: tuple[int, ...]
    nbytes: int | None
    max_kl: float | None


def open_settings(stage_settings: MethodSettings) -> BudgetSettings | None:
    """A stage's settings if a target says how many bits there are."""
    is_open = isinstance(stage_settings, BudgetSettings) and stage_settings.is_open
    return stage_settings if is_open else None  # type: ignore[return-value]


def closed(settings: MethodSettings) -> MethodSettings:
    """With the most bits of a target's candidates, for what isn't chosen by measurement."""
    budget = open_settings(settings)
    return settings if budget is None else budget.at_bits(max(budget.candidates))


def at_bits(plan: ModulePlan, bits: int) -> ModulePlan:
    """The plan of a matrix with these bits. Its method takes them: those of the plan differ in nothing else."""
    assert isinstance(plan.settings, BudgetSettings)
    settings = plan.settings.at_bits(bits)
    after = expected(method_of(settings), plan.before, settings, value_dtype(plan.before))
    assert not isinstance(after, str), "the matrix is taken at other bits"
    return ModulePlan(plan.name, settings, plan.before, after, plan.note, plan.linear, plan.replaces, plan.is_table)


@dataclass(frozen=True)
class Foreseen:
    """The bits that linears would get if all were alike. budget: None where the stage has no target."""

    budget: BitBudget | None
    bits: Mapping[str, int]

    def settings(self, name: str, asked: MethodSettings) -> MethodSettings:
        """The settings of a linear with its bits."""
        budget = open_settings(asked)
        return asked if budget is None else budget.at_bits(self.bits.get(name, max(budget.candidates)))


def foreseen_bits(
    request: Request,
    linears: Sequence[Linear],
    now: Mapping[str, CompressedWeight],
    tables: Sequence[ModulePlan],
    *,
    beside: int = 0,
) -> Foreseen:
    """What headers say of a target. One that can't be reached goes to `request.problems`.

    now: what each linear is in the checkpoint. tables: what is rounded outside the blocks. beside: bytes that the
    stage adds to the model beside its matrices.
    """
    stage = open_settings(request.stage.settings)
    if stage is None:
        return Foreseen(None, {})
    asked = {one.name: settings for one in linears if (settings := settings_for(request.stage, one.name)) is not None}
    sizes = {
        name: row
        for name, settings in asked.items()
        if (budget := open_settings(settings)) is not None and (row := _sizes(budget, now[name])) is not None
    }
    if not sizes:
        return Foreseen(None, {})
    allowed = _allowance(request, asked, now, sizes, tables)
    if allowed is not None and stage.target_bytes is not None:
        allowed -= beside
    forms: list[int] | None = [len(stage.candidates) - 1] * len(sizes)  # at its largest, if the target is no size
    if allowed is not None:
        weights = [now[name].shape[0] * now[name].shape[1] for name in sizes]
        request.problems.extend(_unreachable(request, stage, allowed, list(sizes.values()), sum(weights)))
        alike = [[count * 4.0**-bits for bits in stage.candidates] for count in weights]
        forms = frontier(alike, list(sizes.values())).within(allowed)
    bits = [stage.candidates[form] for form in forms or [0] * len(sizes)]
    shared_out = BitBudget(frozenset(sizes), stage.candidates, allowed, stage.max_kl)
    return Foreseen(shared_out, dict(zip(sizes, bits, strict=True)))


def _sizes(settings: BudgetSettings, before: CompressedWeight) -> list[int] | None:
    """Bytes of a matrix at each candidate; None where the method refuses it."""
    found = []
    for bits in settings.candidates:
        fit, _ = fitted(settings.at_bits(bits), before.shape)
        after = expected(method_of(fit), before, fit, value_dtype(before))
        if isinstance(after, str):
            return None
        found.append(after.nbytes)
    return found


def _allowance(
    request: Request,
    asked: Mapping[str, MethodSettings],
    now: Mapping[str, CompressedWeight],
    sizes: Mapping[str, Sequence[int]],
    tables: Sequence[ModulePlan],
) -> int | None:
    """Bytes that the matrices of `sizes` may take together; None where the target is no size."""
    stage = open_settings(request.stage.settings)
    assert stage is not None
    fixed = {
        name: after.nbytes
        for name, settings in asked.items()
        if name not in sizes and not isinstance(after := _at_its_bits(settings, now[name]), str)
    }
    if stage.target_bytes is not None:
        changed = [*sizes, *fixed]
        others = request.checkpoint.nbytes - sum(now[name].nbytes for name in changed)
        others += sum(table.after.nbytes - table.before.nbytes for table in tables)
        return stage.target_bytes - others - sum(fixed.values())
    if stage.target_bits is None:
        return None
    weights = sum(now[name].shape[0] * now[name].shape[1] for name in (*sizes, *fixed))
    return int(stage.target_bits * weights / 8) - sum(fixed.values())


def _at_its_bits(settings: MethodSettings, before: CompressedWeight) -> CompressedWeight | str:
    fit, _ = fitted(closed(settings), before.shape)
    return expected(method_of(fit), before, fit, value_dtype(before))


def _unreachable(
    request: Request, stage: BudgetSettings, allowed: int, sizes: Sequence[Sequence[int]], weights: int
) -> list[str]:
    """A sentence where even the fewest bits are too many, or the most too few to reach the target.

    weights: how many the matrices of `sizes` hold.
    """
    target = stage.target_bytes

    def told(nbytes: int) -> str:
        if target is None:
            return f"{8 * nbytes / weights:.3g} bits a weight with their scales"
        return f"a model of {(target - allowed + nbytes) / 1e6:,.4g} MB"

    asked = f"target_bits {stage.target_bits:g}" if target is None else f"target_size {stage.target_size}"
    least, most = sum(min(row) for row in sizes), sum(max(row) for row in sizes)
    fewest, largest = min(stage.candidates), max(stage.candidates)
    if allowed < least:
        return [
            f"{request.where}: {asked} can't be reached: {fewest} bits for all matrices make {told(least)}; ask for "
            "more, or take larger groups."
        ]
    if allowed >= most:
        return [
            f"{request.where}: {asked} leaves nothing to choose: {largest} bits for all matrices make {told(most)}; "
            f"ask for less, or give --bits {largest} instead."
        ]
    return []


def of_all_widths(budget: BitBudget | None, plans: Sequence[ModulePlan]) -> dict[str, CompressedWeight]:
    """The matrices whose bits are still to be chosen, with all widths among them: a layout must hold any choice."""
    if budget is None:
        return {}
    open_ones = [plan for plan in plans if plan.name in budget.names]
    return {
        plan.name: at_bits(plan, budget.candidates[number % len(budget.candidates)]).after
        for number, plan in enumerate(open_ones)
    }
