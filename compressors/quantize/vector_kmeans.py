"""k-means of vectors: the codebooks of product quantization, with an error that may count differently at each place.

A matrix [out, in] is cut into vectors of `dim` columns, those of place p being columns p · dim on. Of codebook entries
c, each vector v is given the one of least ‖(v − c) T_p‖², T_p being what an error costs there: a square root of a block
of the Hessian, say, or nothing, which makes it plain k-means (Jégou, Douze, Schmid 2011, "Product Quantization for
Nearest Neighbor Search", section II).

Stock, Joulin, Gribonval, Graham, Jégou 2020, "And the Bit Goes Down: Revisiting the Quantization of Neural Networks",
section 3.2: the same steps with T of the layer's inputs. An entry that lost all its vectors takes half of those of the
entry that has most, as there. Where this differs: each place has its own T, where the paper has one for all, which says
less; the start is k-means++ (Arthur & Vassilvitskii 2007), by which the sample's error is less than from a draw.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modelzip.kernels.nearest_entry import nearest_entry

SAMPLED = 128
"""Vectors an entry that codebooks are fitted to; more hardly lower the error."""

FEWEST = 1 << 14
"""Vectors that codebooks of few entries are fitted to, and begun with, if there are so many."""

SEEDED = 8
"""Vectors an entry from which those that the search starts with are chosen: their number counts squared, and with eight
times as many the error of 4096 entries in the end is less by 1 % at most, for several times the time."""

APART = 1e-2
"""How far the halves of a split entry begin from each other, in units of the vectors' root mean square."""


def nearest(points: Tensor, entries: Tensor) -> Tensor:
    """int64 [n]: the nearest of entries [count, dim] to points [n, dim]."""
    if entries.shape[1] == 1:  # in one dimension a search, not a product
        order = entries[:, 0].argsort()
        rising = entries[order, 0]
        return order[torch.searchsorted((rising[1:] + rising[:-1]) / 2, points[:, 0].contiguous())]
    return nearest_entry(points, entries)


def assigned(points: Tensor, entries: Tensor, factors: Tensor | None) -> Tensor:
    """int64 [places, n]: the entry [count, dim] of least error for points [places, n, dim].

    factors: T [places, dim, dim]; None for the plain distance.
    """
    if factors is None:
        return nearest(points.flatten(0, 1), entries).reshape(points.shape[:2])
    turned = zip((points @ factors).unbind(0), (entries @ factors).unbind(0), strict=True)
    return torch.stack([nearest(place, there) for place, there in turned])


def fit_entries(
    points: Tensor,
    factors: Tensor | None,
    *,
    count: int,
    steps: int,
    generator: torch.Generator,
    mass: Tensor | None = None,
) -> Tensor:
    """Entries fp32 [count, dim] that make the sum of mass · ‖(v − c) T‖² small over points [places, n, dim].

    factors: T [places, dim, dim], None for 1. mass: [places, n], None for 1. steps: most of Lloyd's steps. The start is
    drawn by generator.
    """
    points, mass = _sample(points, mass, max(SAMPLED * count, FEWEST), generator)
    metric = None if factors is None else factors @ factors.mT
    entries = _seeds(points, metric, mass, count=count, generator=generator)
    apart = APART * float(points.square().mean()) ** 0.5
    before: Tensor | None = None
    for _ in range(steps):
        index = assigned(points, entries, factors)
        if before is not None and torch.equal(index, before):
            break
        before = index
        entries = means(points, index, metric, mass, entries)
        entries = _split(entries, index, apart=apart, generator=generator)
    return entries


def means(points: Tensor, index: Tensor, metric: Tensor | None, mass: Tensor | None, entries: Tensor) -> Tensor:
    """The entries of least error for those points that index [places, n] gives them; one without any stays."""
    places, _, dim = points.shape
    count = len(entries)
    weighed = points if mass is None else points * mass.unsqueeze(-1)
    ones = torch.ones_like(points[..., 0]) if mass is None else mass
    if metric is None:
        sums = points.new_zeros(count, dim).index_add_(0, index.reshape(-1), weighed.reshape(-1, dim))
        held = points.new_zeros(count).index_add_(0, index.reshape(-1), ones.reshape(-1))
        return torch.where(held[:, None] > 0, sums / held[:, None].clamp(min=1e-30), entries)
    flat = (index + count * torch.arange(places, device=index.device)[:, None]).reshape(-1)
    sums = points.new_zeros(places * count, dim).index_add_(0, flat, weighed.reshape(-1, dim))
    held = points.new_zeros(places * count).index_add_(0, flat, ones.reshape(-1)).reshape(places, count)
    right = (sums.reshape(places, count, dim) @ metric).sum(0)
    left = (held.T @ metric.reshape(places, -1)).reshape(count, dim, dim)
    size = left.diagonal(dim1=1, dim2=2).mean(1)
    left.diagonal(dim1=1, dim2=2).add_((1e-6 * size + (size <= 0)).unsqueeze(1))
    return torch.where(size[:, None] > 0, torch.linalg.solve(left, right), entries)


def _split(entries: Tensor, index: Tensor, *, apart: float, generator: torch.Generator) -> Tensor:
    """Entries that hold no point are put beside those that hold most, which are moved as far the other way."""
    held = torch.bincount(index.reshape(-1), minlength=len(entries))
    empty = (held == 0).nonzero()[:, 0]
    if not len(empty):
        return entries
    full = held.argsort(descending=True, stable=True)[: len(empty)]
    empty = empty[: int((held[full] > 1).sum())]
    full = full[: len(empty)]
    shift = apart * torch.randn(len(empty), entries.shape[1], generator=generator).to(entries)
    entries = entries.clone()
    entries[empty] = entries[full] + shift
    entries[full] -= shift
    return entries


def _sample(points: Tensor, mass: Tensor | None, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """So many points [places, n, dim] at most, as many of each place: whole rows of the matrix."""
    places, rows, _ = points.shape
    taken = max(1, -(-most // places))
    if rows <= taken:
        return points, mass
    chosen = torch.randperm(rows, generator=generator)[:taken].sort().values.to(points.device)
    return points[:, chosen], None if mass is None else mass[:, chosen]


def _seeds(
    points: Tensor, metric: Tensor | None, mass: Tensor | None, *, count: int, generator: torch.Generator
) -> Tensor:
    """Entries [count, dim] to start with, by greedy k-means++: each is a point, the best of several that are drawn by
    their squared distances to those that were taken so far."""
    cost = torch.ones_like(points[..., 0]) if mass is None else mass.clone()
    if metric is not None:
        cost *= metric.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    flat, cost = points.reshape(-1, points.shape[-1]), cost.reshape(-1)
    if len(flat) > (most := max(SEEDED * count, FEWEST)):
        chosen = torch.randperm(len(flat), generator=generator)[:most].to(flat.device)
        flat, cost = flat[chosen], cost[chosen]
    turned, norms = flat.T.contiguous(), flat.square().sum(1)
    lots = torch.rand(count, 2 + int(math.log(count)), generator=generator, dtype=torch.float64).to(flat.device)
    far = cost
    seeds = torch.empty(count, flat.shape[1], dtype=flat.dtype, device=flat.device)
    for number, lot in enumerate(lots):
        reached = far.cumsum(0, dtype=torch.float64)
        places = torch.searchsorted(reached, reached[-1] * lot, right=True).clamp(max=len(flat) - 1)
        tried = flat[places]
        apart = torch.addmm(norms, tried, turned, alpha=-2).add_(norms[places, None]).clamp_(min=0).mul_(cost)
        if number > 0:
            apart = torch.minimum(apart, far, out=apart)
        best = apart.sum(1).argmin()
        seeds[number], far = tried[best], apart[best]
    return seeds
