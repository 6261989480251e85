"""The nearest sum of Kronecker products.

Van Loan & Pitsianis 1993, "Approximation with Kronecker Products", section 2. Cut W [m₁m₂, n₁n₂] into m₁n₁ blocks
[m₂, n₂] and make each a row of R(W) [m₁n₁, m₂n₂]. Then ‖W − Σ Aₜ ⊗ Bₜ‖ = ‖R(W) − Σ vec(Aₜ) vec(Bₜ)ᵀ‖, so that the
truncated SVD of R(W) gives the best A and B, and what they lose is the sum of the σ² left out.

The paper takes the factors' shapes as given. Here, unless one is named, those are tried whose worst case is best (a
spectrum of k equal values loses (k − r) / k), and the one is taken that loses least of this very matrix. All shapes are
too many: 420 for [576, 1536].
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from modelzip.compressors.layer import UnsuitableError

from .settings import Kronecker
from .spectrum import affordable_rank, chosen_rank, spectrum, squared_singular_values

TRIED: Final = 32
"""Shapes whose loss is computed. For [576, 1536] that takes 0.4 s on one thread."""


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

    Raises UnsuitableError if the settings name one that doesn't divide the matrix, or if all cost too much.
    """
    named = settings.first_factor
    if named is not None:
        if shape[0] % named[0] or shape[1] % named[1]:
            raise UnsuitableError(f"shape {settings.shape} doesn't divide its {shape[0]} rows and {shape[1]} columns")
        return [named]
    found = [
        (promise, first)
        for first in ((rows, columns) for rows in _divisors(shape[0]) for columns in _divisors(shape[1]))
        if (promise := _promise(sides(shape, first), settings)) is not None
    ]
    if not found:
        raise UnsuitableError(f"no Kronecker factors of its {shape[0]} rows and {shape[1]} columns cost less than it")
    return [first for _, first in sorted(found)[:TRIED]]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _promise(size: tuple[int, int], settings: Kronecker) -> tuple[float, int] | None:
    """The order of shapes: the worst case of what counts, then the longer side; None if it costs too much."""
    shorter = min(size)
    if settings.energy is not None:
        rank = max(1, round(settings.energy * shorter))
        worst = float(rank * sum(size))
    elif settings.rank is not None:
        rank = settings.rank
        worst = float(sum(size))
    else:
        rank = chosen_rank(settings, size)
        worst = 1 - rank / shorter
    return (worst, max(size)) if rank <= min(shorter, affordable_rank(size)) else None


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
