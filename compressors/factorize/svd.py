"""SVD: the best low-rank approximation of a matrix.

Eckart & Young 1936, "The Approximation of One Matrix by Another of Lower Rank". With W = U Σ Vᵀ, no matrix of
rank r comes closer than Ŵ = U_r Σ_r V_rᵀ: ‖W − Ŵ‖² is the sum of the σ² left out.
"""

from __future__ import annotations

from torch import Tensor

from .settings import FactorizeSettings
from .spectrum import chosen_rank, spectrum


def svd(weight: Tensor, settings: FactorizeSettings) -> tuple[Tensor, Tensor]:
    """Factorise weight [out, in] into left [out, rank] and right [rank, in], both with √σ; fp64.

    The rank is what the settings ask for, also where the factors are larger than the weight then.
    """
    decomposed = spectrum(weight)
    rank = chosen_rank(settings, (weight.shape[0], weight.shape[1]), decomposed.squares)
    return decomposed.factors(min(rank, len(decomposed.squares)))
