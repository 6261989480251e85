"""Movement pruning: weights that training moves towards zero are pruned, however large they are.

Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning".
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelzip.weights.sparse import Sparse

Masking: TypeAlias = Literal["top", "threshold"]


def top_kept(scores: Tensor, sparsity: float) -> Tensor:
    """bool, the shape of scores: True for the share 1 - sparsity of the entries with the highest scores.

    Exactly round(sparsity · entries) are False. Section 4 of the paper, Top_v, within one matrix.
    """
    flat = scores.detach().flatten()
    count = flat.numel() - round(sparsity * flat.numel())
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(count, sorted=False).indices] = True
    return kept.reshape(scores.shape)


def soft_penalty(scores: Tensor) -> Tensor:
    """Mean of σ(S) over one matrix, which draws scores below the threshold. Section 4, R(S), less its factor λ_mvp."""
    return scores.float().sigmoid().mean()


class MovementLinear(nn.Module):
    """A linear whose mask is learned: y = x (W ⊙ M(S))ᵀ + b, with a score S for each weight.

    masking: "top": M holds for the share 1 - sparsity of the highest scores, and `sparsity` is set by the schedule
    before each step; "threshold": M holds where S > threshold, and `soft_penalty(scores)` belongs to the loss (soft
    movement pruning). The mask's gradient goes straight through to the scores (equation 3 of the paper):
    ∂L/∂S = ∂L/∂(W ⊙ M) ⊙ W, also where the mask is False, so that a pruned weight may come back.
    Scores start at 0; one step of SGD gives S = -lr ∂L/∂(W ⊙ M) ⊙ W (equation 4). The weight's own gradient is masked.
    dtype: of the stored values at the end, the weight's own without.
    Scores want a learning rate of their own (1e-2 with Adam in the paper) and no weight decay.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        masking: Masking = "top",
        threshold: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.masking, self.threshold, self.sparsity = masking, threshold, 0.0
        self.stored_dtype = weight.dtype if dtype is None else dtype
        self.weight = nn.Parameter(weight.detach().clone())
        # Soft scores start above the threshold, so that the whole matrix takes part at first.
        start = 0.0 if masking == "top" else threshold + 1.0
        self.scores = nn.Parameter(torch.full_like(self.weight, start, dtype=torch.float32))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def kept(self) -> Tensor:
        """bool [out, in]: the mask as it is now."""
        return top_kept(self.scores, self.sparsity) if self.masking == "top" else self.scores > self.threshold

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        mask: Tensor = _StraightThrough.apply(self.scores, self.kept())  # type: ignore[no-untyped-call]
        return F.linear(x, (self.weight * mask).to(x.dtype), self.bias)

    @torch.no_grad()
    def freeze(self) -> Sparse:
        """The weights that are kept now."""
        return Sparse.of_dense(self.weight, self.kept(), dtype=self.stored_dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, masking={self.masking}"


class _StraightThrough(torch.autograd.Function):
    """The mask as numbers; its gradient is taken as the scores'."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, kept: Tensor) -> Tensor:
        return kept.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
