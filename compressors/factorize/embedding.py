"""A narrow embedding and a projection in place of a wide embedding.

The form is ALBERT's (Lan et al. 2019, section 3.1), E [tokens, hidden] = left [tokens, rank] @ right [rank, hidden]; it
trains them from scratch. To start from a trained embedding, frequent tokens count more, as in Chen et al. 2018,
"GroupReduce: Block-Wise Low-Rank Approximation for Neural Language Model Shrinking", section 3.2 (without its blocks):
the sum over the tokens v of f_v ‖e_v − ê_v‖² is ‖D(E − Ê)‖² with D = diag(√f). With D E = U Σ Vᵀ the best of rank r is
Ê = D⁻¹ U_r Σ_r V_rᵀ, and that is E V_r V_rᵀ: D isn't inverted, so tokens may have no weight at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .settings import FactorizeSettings
from .spectrum import chosen_rank


def embedding_factors(
    embedding: Tensor, settings: FactorizeSettings, frequency: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factorise embedding [tokens, hidden] into left [tokens, rank] and right [rank, hidden]; fp32.

    frequency: what each token's error counts, [tokens], 0 or more; all the same without it. The rank is what the
    settings ask for, energy counted with these weights, also where the factors are larger than the embedding.
    """
    weighted = embedding.float() if frequency is None else embedding.float() * frequency.sqrt().float()[:, None]
    squares, vectors = torch.linalg.eigh(_gram(weighted))
    squares, vectors = squares.flip(0).clamp_min(0), vectors.flip(1)
    rank = chosen_rank(settings, (embedding.shape[0], embedding.shape[1]), squares)
    kept = vectors[:, :rank].float()
    return embedding.float() @ kept, kept.T


def smoothed(counts: Tensor) -> Tensor:
    """Weights [tokens], fp64, mean 1, from how often each token was seen [tokens]: once more than it was."""
    weights = counts.double() + 1
    return weights / weights.mean()


def _gram(matrix: Tensor, rows: int = 8192) -> Tensor:
    """matrixᵀ matrix in fp64 [hidden, hidden], some rows at a time: an embedding in fp64 would take much memory."""
    total = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for start in range(0, len(matrix), rows):
        wide = matrix[start : start + rows].double()
        total.addmm_(wide.T, wide)
    return total
