"""Iterative magnitude pruning with rewinding: the winning ticket, and the controls that it must beat.

Frankle & Carbin 2019, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", for BERT:
Chen et al. 2020, "The Lottery Ticket Hypothesis for Pre-trained BERT Networks", algorithm 1. A round: train, prune a
share of the weights that are left, put those that stay back to what they were at the start (or at an early step).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Masks: TypeAlias = Mapping[str, Tensor]
"""bool tensors by the matrices' names, True where a weight is kept."""


def round_shares(sparsity: float, *, share: float = 0.2) -> tuple[float, ...]:
    """What share of the remaining weights each round prunes so that `sparsity` is reached: `share`, less in the last.

    (1 - sparsity) is the product of (1 - each); 0.2 a round is Frankle & Carbin's.
    """
    left = 1 - sparsity
    full = math.floor(math.log(left) / math.log(1 - share) + 1e-9)
    last = 1 - left / (1 - share) ** full
    return (share,) * full + ((last,) if last > 1e-9 else ())


def next_kept(
    trained: Mapping[str, Tensor],
    kept: Masks | None = None,
    *,
    share: float = 0.2,
    scope: Literal["global", "local"] = "global",
) -> dict[str, Tensor]:
    """The masks after one more round: the share of the remaining weights that training left smallest is pruned.

    trained: the matrices after training. kept: the masks so far; None: all. scope: "global" compares all matrices at
    once, as Chen et al. do, so that layers become unequally sparse; "local" prunes the same share of each. Exactly
    round(share · remaining) weights go; of equal ones the first. A pruned weight never returns.
    Without `kept` it is plain magnitude pruning, which the gradual schedule repeats with a share that grows.
    """
    if scope == "local":
        each = [({name: trained[name]}, None if kept is None else {name: kept[name]}) for name in trained]
        return {name: mask for part in each for name, mask in next_kept(*part, share=share).items()}
    names = list(trained)
    masks = {name: torch.ones_like(trained[name], dtype=torch.bool) if kept is None else kept[name] for name in names}
    sizes = torch.cat([trained[name][masks[name]].detach().float().abs() for name in names])
    count = round(share * sizes.numel())
    stays = torch.ones_like(sizes, dtype=torch.bool)
    if count:
        threshold = sizes.kthvalue(count).values
        stays = sizes > threshold
        equal = (sizes == threshold).nonzero().flatten()
        stays[equal[count - int((sizes < threshold).sum()) :]] = True
    parts = torch.split(stays, [int(masks[name].sum()) for name in names])
    return {name: masks[name].masked_scatter(masks[name], part) for name, part in zip(names, parts, strict=True)}


def kept_at(
    weights: Mapping[str, Tensor],
    kept: Masks | None = None,
    *,
    sparsity: float,
    scope: Literal["global", "local"] = "global",
) -> dict[str, Tensor]:
    """The masks under which exactly round(sparsity · entries) are pruned: of all matrices together, or of each (local).

    weights, kept, scope: see `next_kept`. Where more are pruned already, nothing is.
    """
    if scope == "local":
        each = [({name: weights[name]}, None if kept is None else {name: kept[name]}) for name in weights]
        return {name: mask for part in each for name, mask in kept_at(*part, sparsity=sparsity).items()}
    entries = sum(weight.numel() for weight in weights.values())
    left = entries if kept is None else sum(int(kept[name].sum()) for name in weights)
    surplus = max(0, left - (entries - round(sparsity * entries)))
    return next_kept(weights, kept, share=surplus / max(left, 1))


def round_sparsities(sparsity: float, *, share: float = 0.2) -> tuple[float, ...]:
    """The sparsity after each of the rounds that `round_shares` has; the last is `sparsity` itself."""
    left, found = 1.0, []
    for each in round_shares(sparsity, share=share):
        left *= 1 - each
        found.append(1 - left)
    return (*found[:-1], sparsity)


def masked(weights: Mapping[str, Tensor], kept: Masks) -> dict[str, Tensor]:
    """The weights with all that isn't kept at zero. Of the initial weights it is the rewind: m ⊙ θ₀."""
    return {name: torch.where(kept[name], weights[name], 0.0) for name in kept}


def sparsity_of(kept: Masks) -> float:
    """Share of the weights that are pruned."""
    return 1 - sum(int(mask.sum()) for mask in kept.values()) / sum(mask.numel() for mask in kept.values())


def random_kept(kept: Masks, generator: torch.Generator) -> dict[str, Tensor]:
    """Control: in every matrix as many weights kept as in the ticket, but which ones is left to chance."""
    return {name: _shuffled(mask, generator) for name, mask in kept.items()}


def reinitialised(initial: Mapping[str, Tensor], kept: Masks, generator: torch.Generator) -> dict[str, Tensor]:
    """Control: the ticket's masks over new normal weights with each matrix's own mean and standard deviation.

    Matching the moments rather than the architecture's initialisation keeps the scale that the other layers expect.
    """
    drawn = {}
    for name in kept:
        weight = initial[name].float()
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)
        drawn[name] = (weight.mean() + weight.std() * noise).to(initial[name].dtype)
    return masked(drawn, kept)


def shuffled(initial: Mapping[str, Tensor], kept: Masks, generator: torch.Generator) -> dict[str, Tensor]:
    """Control: the ticket's masks over the initial weights, whose places within each matrix are shuffled."""
    return masked({name: _shuffled(initial[name], generator) for name in kept}, kept)


def _shuffled(tensor: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.flatten()[order].reshape(tensor.shape)
