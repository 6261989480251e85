"""From a compressed weight to a module with gradients, and back."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from .affine import Affine
from .bilevel import Bilevel
from .codebook import Codebook
from .dense import Dense
from .float import Float
from .int8 import Int8
from .kinds import from_tensors
from .low_rank import LowRank
from .mixed_columns import MixedColumns
from .module import CompressedModule, shadow
from .rounded_inputs import RoundedInputs
from .sparse import Sparse
from .value import CompressedWeight
from .vector_codebook import VectorCodebook
from .with_outliers import WithOutliers


class TrainableDense(nn.Linear):
    """A plain linear that gives its weight back as the value that it came from, in the dtype that it had."""

    def __init__(self, weight: Dense, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> None:
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight.weight.detach().to(dtype, copy=True))
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
        self._stored_dtype = weight.dtype

    def freeze(self) -> Dense:
        """The weight as it is now."""
        return Dense(self.weight.detach().to(self._stored_dtype, copy=True))


class TrainableLinear(nn.Module):
    """y = x @ W.T + bias, with the floating tensors that make up W as parameters in `dtype`.

    Of a sparse weight, only the kept entries are parameters: the others stay exactly zero, whatever the optimizer.
    """

    bias: nn.Parameter | None

    def __init__(
        self, weight: CompressedWeight, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._meta = weight.meta()
        self._stored = {name: tensor.dtype for name, tensor in weight.tensors().items()}
        self._compute_dtype = dtype
        for name, tensor in weight.tensors().items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor.detach().to(dtype, copy=True)))
            else:
                self.register_buffer(name, tensor)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().to(dtype, copy=True)))

    @property
    def weight(self) -> Tensor:
        """Shape [out, in] and dtype without any values, on the meta device, for code that asks a linear for no more."""
        return shadow(self.out_features, self.in_features, self._compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        tensors = {name: getattr(self, name) for name in self._stored}
        y = from_tensors(tensors, self._meta).matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def freeze(self) -> CompressedWeight:
        """The weight as it is now, of the kind and in the dtypes that it came in."""
        tensors = {name: getattr(self, name).detach().to(dtype, copy=True) for name, dtype in self._stored.items()}
        return from_tensors(tensors, self._meta)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self._meta['kind']}"


Trainable: TypeAlias = TrainableDense | TrainableLinear


def trainable(weight: CompressedWeight, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float32) -> Trainable:
    """A module in place of a linear, whose parameters (in `dtype`) are the weight's own tensors.

    Raises ValueError for integer codes, which have no gradient.
    """
    if holds_codes(weight):
        raise ValueError(f"a weight of kind {weight.kind} with integer codes can't be trained: train it first")
    if isinstance(weight, Dense):
        return TrainableDense(weight, bias, dtype=dtype)
    return TrainableLinear(weight, bias, dtype=dtype)


def unfreeze(module: CompressedModule) -> None:
    """Make the floating tensors of a compressed table parameters, under their own names.

    In the weight's own order, by which a resumed optimizer finds what it knew of each.
    """
    for name in module.weight_value.tensors():
        tensor = module._buffers.get(name)  # None for one that another module keeps
        if tensor is not None and tensor.is_floating_point():
            del module._buffers[name]
            module.register_parameter(name, nn.Parameter(tensor))


def holds_codes(weight: CompressedWeight) -> bool:
    """Whether some values of a weight are integer codes."""
    if isinstance(weight, LowRank):
        return holds_codes(weight.left) or holds_codes(weight.right)
    if isinstance(weight, WithOutliers):
        return holds_codes(weight.inner)
    if isinstance(weight, Sparse):
        return weight.scales is not None
    return isinstance(
        weight, Affine | Bilevel | Codebook | Float | Int8 | MixedColumns | RoundedInputs | VectorCodebook
    )
