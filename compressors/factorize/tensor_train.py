"""TT-SVD: a matrix as a train of small cores.

Oseledets 2011, "Tensor-Train Decomposition", algorithm 1; for matrices Novikov et al. 2015, "Tensorizing Neural
Networks", section 3: W [m₁…m_d, n₁…n_d] is a tensor whose k-th index is the pair (i_k, j_k), and core k has the shape
[r_{k−1}, m_k, n_k, r_k]. From the left, each step cuts the next index off by a truncated SVD. Since what is cut off has
orthonormal columns, the losses of the steps add up: ‖W − Ŵ‖² = Σ ε_k², at most d − 1 times that of the best train with
these ranks.

The papers give all ranks one value, or each step its share of the allowed loss. So do we: ratio and rank mean one value
for all ranks (less where a shorter train couldn't use it), energy an equal share of the loss for every step.
"""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor

from .divisors import divisors
from .settings import TensorTrain
from .spectrum import rank_for_loss, spectrum


def modes(size: int, dims: int) -> tuple[int, ...]:
    """size as a product of dims numbers, falling: one after the other the divisor nearest to what would be even."""
    parts: list[int] = []
    for left in range(dims, 1, -1):
        even = size ** (1 / left)
        parts.append(min(divisors(size), key=partial(_apart, even)))
        size //= parts[-1]
    return tuple(sorted([*parts, size], reverse=True))


def paired_modes(shape: tuple[int, int], dims: int) -> tuple[tuple[int, int], ...]:
    """(m_k, n_k) of each core for a matrix [out, in]: large ones with small ones, so that the cores are alike."""
    return tuple(zip(modes(shape[0], dims), reversed(modes(shape[1], dims)), strict=True))


def as_tensor(weight: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """weight [m1 ... md, n1 ... nd] -> [m1 n1, ..., md nd]."""
    dims = len(pairs)
    split = weight.reshape(*(m for m, _ in pairs), *(n for _, n in pairs))
    order = [axis for k in range(dims) for axis in (k, dims + k)]
    return split.permute(order).reshape([m * n for m, n in pairs])


def parameters(pairs: tuple[tuple[int, int], ...], ranks: tuple[int, ...]) -> int:
    """Of a train with these modes and ranks, d - 1 of them."""
    ends = (1, *ranks, 1)
    return sum(before * m * n * after for before, (m, n), after in zip(ends, pairs, ends[1:], strict=False))


def uniform_ranks(pairs: tuple[tuple[int, int], ...], rank: int) -> tuple[int, ...]:
    """One rank for all, less where the indices on one side of it have fewer values together."""
    sizes = [m * n for m, n in pairs]
    return tuple(min(rank, math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def ranks_for_parameters(pairs: tuple[tuple[int, int], ...], limit: int) -> tuple[int, ...]:
    """The largest uniform ranks, 1 or more, at which the train has no more parameters than the limit."""
    low, high = 1, max(uniform_ranks(pairs, math.prod(m * n for m, n in pairs)), default=1)
    while low < high:
        middle = (low + high + 1) // 2
        if parameters(pairs, uniform_ranks(pairs, middle)) <= limit:
            low = middle
        else:
            high = middle - 1
    return uniform_ranks(pairs, low)


def planned_ranks(shape: tuple[int, int], settings: TensorTrain) -> tuple[int, ...]:
    """The ranks that the settings ask for in a matrix [out, in]; with energy, the largest that cost less than it."""
    assert settings.target_size is None, "a target size becomes a ratio before any matrix is looked at"
    pairs, dense = paired_modes(shape, settings.dims), shape[0] * shape[1]
    if settings.rank is not None:
        return uniform_ranks(pairs, settings.rank)
    if settings.ratio is not None:
        return ranks_for_parameters(pairs, math.floor(settings.ratio * dense + 1e-9))
    return ranks_for_parameters(pairs, dense - 1)


def tensor_train(weight: Tensor, settings: TensorTrain) -> tuple[Tensor, ...]:
    """Factorise weight [out, in] into cores [r_{k-1}, m_k, n_k, r_k]; fp64, all but the last with orthonormal columns.

    The ranks are what the settings ask for, also where the cores are larger than the weight then.
    """
    shape = (weight.shape[0], weight.shape[1])
    pairs = paired_modes(shape, settings.dims)
    rest = as_tensor(weight.double(), pairs)
    if settings.energy is None:
        return tt_svd(rest, pairs, ranks=planned_ranks(shape, settings))
    allowed = (1 - settings.energy) * float(rest.square().sum()) / (len(pairs) - 1)
    return tt_svd(rest, pairs, allowed=allowed)


def tt_svd(
    tensor: Tensor, pairs: tuple[tuple[int, int], ...], *, ranks: tuple[int, ...] | None = None, allowed: float = 0.0
) -> tuple[Tensor, ...]:
    """Cores of a tensor [m1 n1, ..., md nd], fp64, with these ranks, or losing no more than ‖·‖² = allowed a step."""
    cores, before, rest = [], 1, tensor
    for k, (m, n) in enumerate(pairs[:-1]):
        decomposed = spectrum(rest.reshape(before * m * n, -1))
        rank = rank_for_loss(decomposed.squares, allowed) if ranks is None else ranks[k]
        left = decomposed.left_vectors(min(rank, len(decomposed.squares)))
        cores.append(left.reshape(before, m, n, -1))
        rest = left.T @ decomposed.matrix
        before = left.shape[1]
    m, n = pairs[-1]
    return (*cores, rest.reshape(before, m, n, 1))


def _apart(one: float, other: float) -> float:
    return abs(math.log(one / other))
