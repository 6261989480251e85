"""The nearest sum of Kronecker products.

Van Loan & Pitsianis 1993, "Approximation with Kronecker Products", section 2. Cut W [m₁m₂, n₁n₂] into m₁n₁ blocks
[m₂, n₂] and make each a row of R(W) [m₁n₁, m₂n₂]. Then ‖W − Σ Aₜ ⊗ Bₜ‖ = ‖R(W) − Σ vec(Aₜ) vec(Bₜ)ᵀ‖, so that the
truncated SVD of R(W) gives the best A and B, and what they lose is the sum of the σ² left out.

The paper takes the factors' shapes as given. Here, unless one is named, those are tried whose worst case is best (a
spectrum of k equal values loses (k − r) / k), and the one is taken that loses least of this very matrix. All shapes are
too many: 420 for [576, 1536].
"""

from __future__ import annotations

from itertools import product
from typing import Final

import torch
from torch import Tensor

from modelzip.compressors.layer import UnsuitableError

from .divisors import divisors
from .settings import Kronecker
from .spectrum import affordable_rank, chosen_rank, rank_for_ratio, spectrum, squared_singular_values

TRIED: Final = 32
"""Shapes whose loss is computed. For [576, 1536] all of it takes 0.3 s on one thread."""


def rearranged(weight: Tensor, first: tuple[int, int]) -> Tensor:
    """R(W) [m1 n1, m2 n2] of weight [m1 m2, n1 n2]; first: (m1, n1)."""
    rows, columns = first
    blocks = weight.reshape(rows, weight.shape[0] // rows, columns, weight.shape[1] // columns)
    return blocks.transpose(1, 2).reshape(rows * columns, -1)


def kronecker(weight: Tensor, settings: Kronecker) -> tuple[Tensor, Tensor]:
    """Factorise weight [m1 m2, n1 n2] into a [terms, m1, n1] and b [terms, m2, n2], both with √σ; fp64.

    Raises UnsuitableError if no shape of the factors fits the settings.
    """
    shape = (weight.shape[0], weight.shape[1])
    first = _best_shape(weight, shapes(shape, settings), settings)
    decomposed = spectrum(rearranged(weight, first))
    rank = min(chosen_rank(settings, sides(shape, first), decomposed.squares), len(decomposed.squares))
    left, right = decomposed.factors(rank)
    rows, columns = first
    return left.T.reshape(rank, rows, columns), right.reshape(rank, shape[0] // rows, shape[1] // columns)


def sides(shape: tuple[int, int], first: tuple[int, int]) -> tuple[int, int]:
    """Parameters of one a and of one b: the shape of R(W)."""
    size = first[0] * first[1]
    return size, shape[0] * shape[1] // size


def shapes(shape: tuple[int, int], settings: Kronecker) -> list[tuple[int, int]]:
    """The shapes (m1, n1) of the first factor to try for a matrix [out, in], the most promising first.

    Where a ratio is too small for a term of any shape, the cheapest shape. Raises UnsuitableError if the settings name
    one that doesn't divide the matrix, or if all cost as much as the matrix.
    """
    named = settings.first_factor
    if named is not None:
        if shape[0] % named[0] or shape[1] % named[1]:
            raise UnsuitableError(f"shape {settings.shape} doesn't divide its {shape[0]} rows and {shape[1]} columns")
        return [named]
    every = product(divisors(shape[0]), divisors(shape[1]))
    size_of = {first: size for first in every if affordable_rank(size := sides(shape, first)) > 0}
    if not size_of:
        raise UnsuitableError(f"no Kronecker factors of its {shape[0]} rows and {shape[1]} columns cost less than it")
    small = [first for first, size in size_of.items() if _cost(size, settings) <= _limit(shape, settings)]
    if not small:
        return [min(size_of, key=lambda first: sum(size_of[first]))]
    return sorted(small, key=lambda first: _worst_case(size_of[first], settings))[:TRIED]


def _share(settings: Kronecker) -> float:
    """Of the matrix's parameters: what the factors may have; where the settings leave that open, half."""
    return 0.5 if settings.ratio is None else settings.ratio


def _limit(shape: tuple[int, int], settings: Kronecker) -> float:
    dense = shape[0] * shape[1]
    return dense - 1 if settings.ratio is None else settings.ratio * dense


def _cost(size: tuple[int, int], settings: Kronecker) -> int:
    """Parameters of the fewest terms that the settings can ask for."""
    return (settings.rank or 1) * sum(size)


def _worst_case(size: tuple[int, int], settings: Kronecker) -> tuple[float, int]:
    """The order of shapes: the share lost of a flat spectrum, or the cost of a term; then the longer side."""
    if settings.rank is not None:
        return sum(size), max(size)
    return 1 - rank_for_ratio(_share(settings), size) / min(size), max(size)


def _best_shape(weight: Tensor, tried: list[tuple[int, int]], settings: Kronecker) -> tuple[int, int]:
    """With energy the shape with the fewest parameters, otherwise the one that loses least."""
    if len(tried) == 1:
        return tried[0]
    shape = (weight.shape[0], weight.shape[1])
    costs = []
    for first in tried:
        size, squares = sides(shape, first), squared_singular_values(rearranged(weight, first))
        rank = chosen_rank(settings, size, squares)
        costs.append(float(rank * sum(size)) if settings.energy is not None else float(squares[rank:].sum()))
    return tried[int(torch.tensor(costs).argmin())]
