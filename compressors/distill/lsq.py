"""Learned step size quantization: training with rounded weights whose grid is learned too.

Esser et al. 2020, "Learned Step Size Quantization". With a zero point: Bhalgat et al. 2020, "LSQ+: Improving low-bit
quantization through learnable offsets and better initialization".
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelzip.weights.affine import Affine
from modelzip.weights.sparse import Sparse


def lsq_start(weight: Tensor, *, bits: int, group_size: int, dtype: torch.dtype) -> Affine:
    """The paper's start for weight [out, in]: a symmetric grid with step 2 ⟨|w|⟩ / √Qp for each group of columns.

    dtype: of the stored steps. Section 2.1 of the paper. For few bits a grid that was fitted to the weights is nearer.
    """
    _, Qp = _range(bits)
    grouped = weight.float().reshape(weight.shape[0], -1, group_size)
    step = (2 * grouped.abs().mean(-1) / math.sqrt(Qp)).clamp(min=torch.finfo(torch.float32).tiny).to(dtype)
    codes = _codes(grouped, step.float().unsqueeze(-1), None, bits)
    return Affine.from_codes(codes.reshape(weight.shape), step, None, bits=bits)


def fake_quantize(
    weight: Tensor, step: Tensor, zero_point: Tensor | None, *, bits: int, dtype: torch.dtype, rescale: bool = True
) -> Tensor:
    """The value fp32 [out, in] that each entry of weight [out, in] takes on the grid, with LSQ's gradients.

    step: fp32 [out, groups], or [1, 1] for one a matrix, used as it will be stored: rounded to `dtype`, in which the
    products are rounded too, so that this is `Affine.dense()` bit for bit. zero_point: fp32, the shape of step, used
    rounded and clamped to the codes' range; None if the grid is symmetric.

    Gradients, with v = w / s + z and -Qn, Qp the ends of the codes' range (equations 3 and 5 of LSQ, 5 to 7 of LSQ+):
    of w: 1 where -Qn < v < Qp, else 0; of s: round(v) - v there, else the end's code, less z; of z: 0 there, else -s.
    s's and z's are multiplied by g = 1 / √(N Qp) if `rescale`, N being the weights that share a step (section 2.2).
    LSQ+ lets its offset be any number; a stored zero point is whole, so it is rounded, and its gradient goes straight
    through the rounding.
    """
    shape = weight.shape
    shared = step.numel() == 1
    grouped = weight.reshape(1, 1, -1) if shared else weight.reshape(shape[0], step.shape[1], -1)
    offset = None if zero_point is None else zero_point.unsqueeze(-1)
    _, Qp = _range(bits)
    gradient_scale = 1 / math.sqrt(grouped.shape[-1] * Qp) if rescale else 1.0
    value = _FakeQuantize.apply(grouped, step.unsqueeze(-1), offset, bits, dtype, gradient_scale)  # type: ignore[no-untyped-call]
    return value.reshape(shape)  # type: ignore[no-any-return]


class LsqLinear(nn.Module):
    """A linear whose weight is trained on a grid that is learned along with it.

    weight: [out, in], kept in fp32 or in what it comes in. start: the first grid, as `rtn` or `lsq_start` gives it for
    this weight. kept: bool [out, in], False where an entry is zero and stays so; None if nowhere. pattern: (n, m) if
    kept holds for at most n of m columns in a row.
    Optimizers should leave `step` and `zero_point` without weight decay: it would shrink the grid.
    """

    kept: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        start: Affine,
        bias: Tensor | None = None,
        *,
        kept: Tensor | None = None,
        pattern: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = start.shape
        self.bits = start.bits
        self.step_dtype = start.scale.dtype
        self.weight = nn.Parameter(weight.detach().clone())
        self.step = nn.Parameter(start.scale.detach().float().clone())
        zero_point = start.zero_point
        self.zero_point = None if zero_point is None else nn.Parameter(zero_point.float())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.pattern = pattern
        self.register_buffer("kept", kept)

    def _masked(self) -> Tensor:
        weight = self.weight.float()
        return weight if self.kept is None else torch.where(self.kept, weight, 0.0)

    def rounded(self) -> Tensor:
        """The weight fp32 [out, in] on its grid, as the forward pass uses it."""
        return fake_quantize(self._masked(), self.step, self.zero_point, bits=self.bits, dtype=self.step_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        return F.linear(x, self.rounded().to(x.dtype), self.bias)

    def freeze(self) -> Affine | Sparse:
        """What the weight has become, in the format of quantization after training; `dense()` equals `rounded()`.

        With entries that aren't kept, only the codes of the others are stored.
        """
        affine = self._affine()
        return affine if self.kept is None else Sparse.of_affine(affine, self.kept, pattern=self.pattern)

    @torch.no_grad()
    def _affine(self) -> Affine:
        """All codes; entries that aren't kept are exactly 0, which lies on every grid: its code is the zero point."""
        grouped = self._masked().reshape(self.step.shape[0], self.step.shape[1], -1)
        step = _stored(self.step, self.step_dtype)
        offset = None if self.zero_point is None else _whole(self.zero_point, self.bits)
        codes = _codes(grouped, step.unsqueeze(-1), None if offset is None else offset.unsqueeze(-1), self.bits)
        return Affine.from_codes(
            codes.reshape(self.out_features, self.in_features),
            step.to(self.step_dtype),
            None if offset is None else offset.to(torch.int8),
            bits=self.bits,
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class _FakeQuantize(torch.autograd.Function):
    """Weights grouped [out, groups, size], step and zero point [out, groups, 1]."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        step: Tensor,
        zero_point: Tensor | None,
        bits: int,
        dtype: torch.dtype,
        gradient_scale: float,
    ) -> Tensor:
        step = _stored(step, dtype)
        offset = None if zero_point is None else _whole(zero_point, bits)
        ctx.save_for_backward(weight, step, offset)
        ctx.bits, ctx.gradient_scale = bits, gradient_scale
        codes = _codes(weight, step, offset, bits).to(dtype)
        if offset is not None:
            codes = codes - offset.to(dtype)
        return (codes * step.to(dtype)).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, step, offset = ctx.saved_tensors
        lowest, Qp = _range(ctx.bits)
        z = 0.0 if offset is None else offset
        v = weight / step + z
        inside = (v > lowest) & (v < Qp)
        per_step = torch.where(inside, v.round() - v, v.clamp(lowest, Qp) - z)
        of_weight = torch.where(inside, gradient, 0.0)
        of_step = (gradient * per_step).sum(-1, keepdim=True) * ctx.gradient_scale
        of_zero = None
        if offset is not None:
            of_zero = torch.where(inside, 0.0, -step * gradient).sum(-1, keepdim=True) * ctx.gradient_scale
        return of_weight, of_step, of_zero, None, None, None


def _range(bits: int) -> tuple[int, int]:
    """-Qn and Qp, the ends of the signed codes."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _codes(grouped: Tensor, step: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    codes = (grouped / step).round_()
    return (codes if zero_point is None else codes.add_(zero_point)).clamp_(*_range(bits))


def _whole(zero_point: Tensor, bits: int) -> Tensor:
    return zero_point.float().round().clamp(*_range(bits))


def _stored(step: Tensor, dtype: torch.dtype) -> Tensor:
    """The step fp32 as it comes back from disk; one that training has brought to 0 stays the least that isn't."""
    stored = step.to(dtype).float()
    tiny = torch.full_like(stored, torch.finfo(dtype).tiny)
    return torch.where(stored.abs() < tiny, tiny.copysign(stored), stored)
