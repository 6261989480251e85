"""One linear compressed: the method is given what it asks for, factor by factor where the weight is a product, and what
takes its place where it can't serve."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from modelzip.compressors.factorize.statistics import factor_hessian
from modelzip.compressors.layer import LayerTask, StatisticKind, UnsuitableError
from modelzip.compressors.methods import FALLBACK
from modelzip.compressors.quantize.settings_budget import BITS, BudgetSettings
from modelzip.compressors.settings import MethodSettings
from modelzip.weights.low_rank import Factor, LowRank
from modelzip.weights.sparse import Sparse
from modelzip.weights.value import CompressedWeight

from .forms import fitted
from .module_plan import ModulePlan, method_of


@dataclass
class Statistic:
    """Of one input tensor x, over the calibration tokens, for the linears it is handed to.

    value: the mean of x xᵀ, [in, in], or that of x², [in]. prepared: what methods made of it. is_pooled: whether the
    tokens are those of several layers, which share the linears' weights. prepared: by the settings, bits aside.
    largest: of |x|, [in]; None where no method asks for it.
    """

    value: Tensor
    tokens: int
    prepared: dict[MethodSettings, Any] = field(default_factory=dict)
    is_pooled: bool = False
    largest: Tensor | None = None

    @property
    def hessian(self) -> Tensor | None:
        """The mean of x xᵀ, if that is what it is and there were tokens."""
        return self.value if self.value.ndim == 2 and self.tokens else None

    @property
    def squares(self) -> Tensor:
        """The mean of x², [in]."""
        return self.value if self.value.ndim == 1 else self.value.diagonal()


def statistic_of(plan: ModulePlan) -> StatisticKind:
    """What is gathered for a matrix: for a product all of x xᵀ, without which nothing is known of its left factor's
    inputs."""
    kind = method_of(plan.settings).statistic
    return "hessian" if kind == "squares" and plan.before.kind == LowRank.kind else kind


def asks_for_largest(plan: ModulePlan) -> bool:
    """Whether the largest magnitudes of a matrix's inputs are gathered."""
    asks = method_of(plan.settings).asks_for_largest
    return asks is not None and asks(plan.settings)


@dataclass(frozen=True)
class Solved:
    """weight: None if the matrix is left as it is. method: what made it. fallback: why not the one asked for."""

    weight: CompressedWeight | None
    method: str
    fallback: str | None
    note: str | None


@dataclass(frozen=True)
class Job:
    """What doesn't depend on the matrix: the type of stored values, the survey's result, the seed of chance."""

    dtype: torch.dtype
    surveyed: Any
    seed: int


def solve(
    name: str,
    weight: Tensor,
    now: CompressedWeight | None,
    *,
    settings: MethodSettings,
    statistic: Statistic | None,
    job: Job,
) -> Solved:
    """Compress weight fp32 [out, in]. now: how the checkpoint holds it if not dense."""
    if isinstance(now, LowRank):
        return _solve_factors(name, now, settings=settings, statistic=statistic, job=job)
    kept = now.kept.to(weight.device) if isinstance(now, Sparse) else None
    generator = torch.Generator().manual_seed(seed_of(job.seed, name))
    largest = None if statistic is None or not statistic.tokens else statistic.largest
    task = LayerTask(weight, settings, job.dtype, generator, surveyed=job.surveyed, kept=kept, largest=largest)
    try:
        return _solve(task, statistic)
    except UnsuitableError as error:
        plainer = FALLBACK.get(type(settings))
        if plainer is None:
            return Solved(None, settings.method, str(error), None)
        plain = plainer(settings)
        try:
            return Solved(method_of(plain).compress(replace(task, settings=plain)), plain.method, str(error), None)
        except UnsuitableError:  # without inputs, there is nothing to say of those to come
            return Solved(None, settings.method, str(error), None)


def _solve(task: LayerTask, statistic: Statistic | None) -> Solved:
    settings, method = task.settings, method_of(task.settings)
    prepared = note = None
    if method.statistic != "none":
        if statistic is None or statistic.tokens == 0:
            raise UnsuitableError("no calibration token reached it")
        key = settings.at_bits(BITS) if isinstance(settings, BudgetSettings) else settings
        if key not in statistic.prepared:
            value = statistic.squares if method.statistic == "squares" else statistic.value
            if method.prepare_ranged is not None:
                assert statistic.largest is not None, "the method asks for it"
                value = method.prepare_ranged(value, statistic.largest, settings)
            elif method.prepare is not None:
                value = method.prepare(value, settings)
            statistic.prepared[key] = value
        prepared = statistic.prepared[key]
        note = None if method.note is None else method.note(prepared, settings)
    return Solved(method.compress(replace(task, prepared=prepared)), settings.method, None, note)


def _solve_factors(
    name: str, now: LowRank, *, settings: MethodSettings, statistic: Statistic | None, job: Job
) -> Solved:
    """W = L R: R sees the inputs x, and L sees what the compressed R makes of them, so its Hessian is R̂ H R̂ᵀ."""
    halves = []
    for part, factor in (("right", now.right), ("left", now.left)):
        fit, _ = fitted(settings, factor.shape)
        dense = factor.dense(torch.float32)
        half = solve(f"{name}.{part}", dense, None, settings=fit, statistic=statistic, job=job)
        halves.append(half)
        if statistic is not None and part == "right":
            fed = (half.weight or factor).dense(torch.float32)
            statistic = Statistic(factor_hessian(statistic.value, fed), statistic.tokens)
    right_half, left_half = halves
    left, right = left_half.weight or now.left, right_half.weight or now.right
    assert isinstance(left, Factor), "the plan has refused other kinds"
    assert isinstance(right, Factor)
    notes = [f"{side} factor: {half.note}" for side, half in zip(("right", "left"), halves, strict=True) if half.note]
    fallback = right_half.fallback or left_half.fallback
    method = next((half.method for half in halves if half.fallback), settings.method)
    return Solved(LowRank(left, right), method, fallback, "; ".join(notes) or None)


def seed_of(seed: int, name: str) -> int:
    """A seed of the module's own, so that what is drawn doesn't depend on which other modules there are."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
