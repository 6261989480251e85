"""Which heads, neurons and layers go: pure functions from scores to what stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """What stays of one module's units, ascending, int64. units: heads or neurons. pairs: key and value heads."""

    units: Tensor
    pairs: Tensor


@dataclass(frozen=True)
class Bundle:
    """Units that can only go together. score: of all. pair: the key and value head that goes with them, or -1."""

    score: float
    layer: int
    units: tuple[int, ...]
    pair: int


def normalised(scores: Sequence[Tensor]) -> list[Tensor]:
    """Each layer's scores over their L2 norm, as Michel et al. 2019 (section 4.1, after Molchanov et al. 2017) do."""
    return [score / norm if (norm := score.norm()) > 0 else score for score in scores]


def bundles(score: Tensor, layer: int, *, group: int, whole_groups: bool) -> list[Bundle]:
    """The bundles of one layer in the order in which they go, the least important first.

    score: [heads]. group: query heads to a key and value head. Whole groups go with their key and value head; else a
    bundle takes one query head, the least important that is left, from every group, so that groups stay of one size.
    """
    grid = score.double().view(-1, group)  # [pairs, group]
    if whole_groups or group == 1:
        found = [
            Bundle(float(row.sum()), layer, tuple(range(pair * group, (pair + 1) * group)), pair)
            for pair, row in enumerate(grid)
        ]
        return sorted(found, key=lambda bundle: (bundle.score, bundle.pair))
    order = grid.argsort(dim=1, stable=True)
    first = torch.arange(len(grid))[:, None] * group
    return [
        Bundle(float(grid.gather(1, order[:, place : place + 1]).sum()), layer, tuple(taken.tolist()), -1)
        for place, taken in enumerate((first + order).T)
    ]


def choose(
    scores: Sequence[Tensor], *, share: float, scope: str, group: int = 1, whole_groups: bool = False, multiple: int = 1
) -> list[Kept]:
    """What stays of each layer's units when `share` of them go, the least important first and never all of a layer.

    scores: [units] of each layer. scope: "uniform" takes as many from every layer, "global" those with the lowest
    scores of all. multiple: of the units that stay in each layer (uniform only).
    """
    queues = [bundles(s, i, group=group, whole_groups=whole_groups) for i, s in enumerate(scores)]
    if scope == "uniform":
        gone = [queue[: removed(len(queue), share, multiple=multiple)] for queue in queues]
    else:
        target = round(share * sum(len(score) for score in scores))
        gone = [[] for _ in queues]
        taken = 0
        # The last bundle of a layer, its most important one, always stays.
        for bundle in sorted((b for queue in queues for b in queue[:-1]), key=lambda b: (b.score, b.layer)):
            if taken + len(bundle.units) <= target:
                gone[bundle.layer].append(bundle)
                taken += len(bundle.units)
    return [_kept(len(score), gone[layer], group=group) for layer, score in enumerate(scores)]


def removed(count: int, share: float, *, multiple: int = 1) -> int:
    """How many of `count` bundles go: the nearest number to the share whose rest is a multiple, at least one left."""
    stay = multiple * max(1, round(count * (1 - share) / multiple))
    return max(0, count - stay)


def _kept(count: int, gone: Sequence[Bundle], *, group: int) -> Kept:
    units = torch.ones(count, dtype=torch.bool)
    pairs = torch.ones(count // group, dtype=torch.bool)
    for bundle in gone:
        units[list(bundle.units)] = False
        if bundle.pair >= 0:
            pairs[bundle.pair] = False
    return Kept(units.nonzero()[:, 0], pairs.nonzero()[:, 0])


def magnitudes(weights: Sequence[Tensor]) -> Tensor:
    """The importance of neurons by their weights: the product of the norms of each neuron's entries, [neurons].

    weights: each [neurons, n]: the rows of the input projections, the columns of the output projection. For a ReLU
    neuron, and up against down of a gated one, the product doesn't change when one is scaled by a and the other by 1/a,
    as the function doesn't. (Li et al. 2017, "Pruning Filters for Efficient ConvNets", take the norm of the inputs
    alone, which does.)
    """
    product = torch.ones(len(weights[0]), dtype=torch.float64)
    for weight in weights:
        product *= weight.double().norm(dim=1)
    return product


def least_influential(influence: Sequence[float], count: int) -> list[int]:
    """The `count` layers with the lowest block influence, ascending (Men et al. 2024, section 3.3)."""
    order = sorted(range(len(influence)), key=lambda layer: (influence[layer], layer))
    return sorted(order[:count])


def every_other(layers: int, every: int) -> list[int]:
    """The layers that go when the last of each `every` does: 1, 3, 5, ... for 2 (Sajjad et al. 2020, alternate)."""
    return list(range(every - 1, layers, every))


def tokens_to_keep(counts: Mapping[int, int], always: set[int], *, min_count: int, most: int | None) -> list[int]:
    """Ids that stay, ascending: those always kept, and the most frequent ones of those with at least `min_count`.

    most: of all that stay; those always kept count, but none of them goes.
    """
    frequent = sorted(
        (t for t, n in counts.items() if n >= min_count and t not in always), key=lambda t: (-counts[t], t)
    )
    room = len(frequent) if most is None else max(0, most - len(always))
    return sorted({*always, *frequent[:room]})
