"""The one module that computes with a compressed weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .affine import Affine


class CompressedLinear(nn.Module):
    """y = x @ W.T + bias with W packed. The packed tensors are buffers, named as in the checkpoint.

    The buffers may start on the meta device: a loader fills them by name, and the weight is read from them each time.
    """

    def __init__(self, weight: Affine, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bits = weight.bits
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)
        self.bias = bias

    @property
    def weight_value(self) -> Affine:
        """The compressed weight over this module's buffers."""
        tensors = dict(self.named_buffers(recurse=False))
        return Affine.from_tensors(
            tensors | {"weight_shape": torch.tensor((self.out_features, self.in_features))}, {"bits": self.bits}
        )

    @property
    def weight(self) -> Tensor:
        """Shape [out, in] and dtype without any values, on the meta device, for code that asks a linear for no more.

        T5 looks at the dtype in its forward pass, and GPT-2 and T5 initialise weights through the parent module, which
        the flag of transformers prevents.
        """
        dtype = self.get_buffer("weight_scale").dtype
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight_value.matmul(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
