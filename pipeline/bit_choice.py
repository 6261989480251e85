"""A width for each matrix: the least loss for a size, or the least size for a loss.

A knapsack finds it; linears that share an input are taken as one, since engines fuse them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelzip.checkpoints.errors import RecipeError
from modelzip.compressors.quantize.allocate import frontier

from .bit_budget import BitBudget


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
