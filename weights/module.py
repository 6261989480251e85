"""What the modules that compute with compressed weights have in common: the weight's tensors as buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .dense import Dense
from .kinds import from_tensors
from .value import CompressedWeight, dtype_name


class CompressedModule(nn.Module):
    """Holds a compressed weight as buffers that are named as in the checkpoint.

    The buffers may start on the meta device: a loader fills them by name, and the weight is read from them each time.
    dtype: in which it computes, if the caller doesn't say. Raises ValueError for a dense weight, which plain modules
    hold.
    """

    def __init__(self, weight: CompressedWeight, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if isinstance(weight, Dense):
            raise ValueError("a dense weight belongs in a plain nn.Linear or nn.Embedding")
        self.weight_meta = weight.meta()
        self.compute_dtype = weight.dtype if dtype is None else dtype
        self._shared: dict[str, tuple[nn.Module, str]] = {}
        self._suffixes = tuple(weight.tensors())
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half` and `float` do with the buffers decides in which dtype the module computes, too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    def share(self, suffix: str, owner: nn.Module, of_owner: str) -> None:
        """From now on, take one of the weight's tensors from another module, which alone keeps and saves it.

        A link to the module, not to the tensor: moving a model to another device makes new buffers.
        """
        del self._buffers[suffix]
        self._shared[suffix] = (owner, of_owner)

    def __getattr__(self, name: str) -> Any:
        shared = self.__dict__.get("_shared", {})
        if name in shared:
            owner, of_owner = shared[name]
            return getattr(owner, of_owner)
        return super().__getattr__(name)

    @property
    def weight_value(self) -> CompressedWeight:
        """The compressed weight over this module's buffers."""
        return from_tensors({name: getattr(self, name) for name in self._suffixes}, self.weight_meta)

    @property
    def weight(self) -> Tensor:
        """Shape and dtype without any values, on the meta device, for code that asks a module for no more.

        T5 looks at the dtype in its forward pass, and GPT-2 and T5 initialise weights through the parent module, which
        the flag of transformers prevents.
        """
        rows, columns = self.weight_meta["shape"]
        return shadow(rows, columns, self.compute_dtype)

    def extra_repr(self) -> str:
        value = self.weight_value
        meta = value.meta()
        precision = f"bits={meta['bits']}" if "bits" in meta else f"dtype={dtype_name(value.dtype)}"
        return f"out={value.shape[0]}, in={value.shape[1]}, kind={value.kind}, {precision}"


def shadow(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix without values, which transformers takes for initialised."""
    weight = torch.empty(rows, columns, dtype=dtype, device="meta")
    weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return weight
