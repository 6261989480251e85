"""A linear that trains under a mask from outside: what gradual magnitude pruning and the lottery train with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelzip.weights.sparse import Sparse


class MaskedLinear(nn.Module):
    """y = x (W ⊙ M)ᵀ + b. Weights that aren't kept count nothing and get no gradient, but stay there.

    A mask that lets one of them back finds it where it was (Zhu & Gupta 2017, section 3), but for what an optimizer's
    momentum and weight decay have moved it since, as they do in the authors' code.
    kept: bool [out, in], all without. dtype: of the stored values at the end, the weight's own without.
    """

    kept: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        kept: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.stored_dtype = weight.dtype if dtype is None else dtype
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("kept", torch.ones_like(weight, dtype=torch.bool) if kept is None else kept.clone())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        return F.linear(x, torch.where(self.kept, self.weight, 0.0).to(x.dtype), self.bias)

    @torch.no_grad()
    def freeze(self) -> Sparse:
        """The weights that are kept now."""
        return Sparse.of_dense(self.weight, self.kept, dtype=self.stored_dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
