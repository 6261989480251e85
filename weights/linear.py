"""The linear that computes with a compressed weight."""

from __future__ import annotations

from torch import Tensor, nn

from .dense import Dense
from .module import CompressedModule
from .value import CompressedWeight


class CompressedLinear(CompressedModule):
    """y = x @ W.T + bias with W compressed."""

    bias: nn.Parameter | None

    def __init__(self, weight: CompressedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight_value.matmul(x)
        return y if self.bias is None else y + self.bias


def linear_of(weight: CompressedWeight, bias: nn.Parameter | None = None) -> CompressedLinear | nn.Linear:
    """The module for a weight of any kind: a plain nn.Linear for a dense one."""
    if not isinstance(weight, Dense):
        return CompressedLinear(weight, bias)
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear
