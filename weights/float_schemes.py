"""Floats as compressed-tensors has them: its three layouts, and what it calls the tensors.

Written is what its engines compute with: fp8 e4m3 with a scale a row or a matrix, and the block formats with their own
sizes, one of them for all modules, since transformers opens packed floats right only if it makes them dense at load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from .float import Float
from .value import dtype_name

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

PLAIN: Final = "float-quantized"
FORMATS: Final = MappingProxyType({"e8m0": "mxfp4-pack-quantized", "e4m3": "nvfp4-pack-quantized"})
"""The layout of 4-bit floats by the kind of their scales."""

BLOCKS: Final = MappingProxyType({"e8m0": 32, "e4m3": 16})
"""Columns that share one of these scales."""


@dataclass(frozen=True)
class FloatScheme:
    """The floats of one module. strategy: what shares a scale: `tensor`, `channel` or `group`. scale: `e8m0`, `e4m3`,
    or "" for plain numbers."""

    element: str
    scale: str
    strategy: str
    group_size: int | None

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> FloatScheme:
        """Of the meta of a float weight."""
        scale = meta["scale"] if meta["scale"] in FORMATS else ""
        return cls(meta["element"], scale, meta["strategy"], meta["group_size"])

    @property
    def is_portable(self) -> bool:
        """Whether engines that know compressed-tensors compute with it."""
        if self.scale:
            return self.element == "e2m1" and self.group_size == BLOCKS[self.scale]
        return self.element == "e4m3" and self.strategy in ("tensor", "channel")

    @property
    def format(self) -> str:
        """Its layout."""
        return FORMATS[self.scale] if self.scale else PLAIN

    @property
    def is_made_dense(self) -> bool:
        """Whether transformers must make it dense at load: packed floats become bf16 there otherwise, whatever the
        activations are."""
        return bool(self.scale)

    def arguments(self) -> QuantizationArgs:
        """compressed-tensors' words for it."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType

        types = {"e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}
        strategy = "tensor_group" if self.scale == "e4m3" else self.strategy
        return QuantizationArgs(
            num_bits=4 if self.scale else 8,
            type=QuantizationType("float"),
            symmetric=True,
            strategy=QuantizationStrategy(strategy),
            group_size=self.group_size,
            scale_dtype=types.get(self.scale),
            zp_dtype=types.get(self.scale),
        )


def portable_floats(metas: Iterable[Mapping[str, Any]]) -> bool:
    """Whether compressed-tensors holds float weights of these metas."""
    distinct = {FloatScheme.of(meta) for meta in metas}
    is_one = len(distinct) == 1 or {scheme.format for scheme in distinct} == {PLAIN}
    return is_one and all(scheme.is_portable for scheme in distinct)


def renamed(weight: Float) -> dict[str, Tensor]:
    """The tensors of a weight as compressed-tensors calls and types them."""
    tensors = weight.tensors()
    if weight.element.bits == 8:
        tensors["weight"] = tensors.pop("weight_packed").view(torch.float8_e4m3fn)
    elif weight.global_scale is not None:
        tensors["weight_scale"] = tensors["weight_scale"].view(torch.float8_e4m3fn)
        tensors["weight_global_scale"] = weight.global_scale.view(torch.float32)
    return tensors


def require_readable(group: Mapping[str, Any], layout: str) -> None:
    """Raises ValueError if a group of compressed-tensors' config asks for more than what `read` gives."""
    weights = group["weights"]
    known = ("tensor", "channel", "group", "tensor_group")
    if weights["type"] != "float" or weights["strategy"] not in known or not weights["symmetric"]:
        raise ValueError(f"quantized as compressed-tensors {layout} of {weights['type']} by {weights['strategy']}")


def read(tensors: Mapping[str, Tensor], layout: str) -> Float:
    """The weight of tensors by suffix in a layout of compressed-tensors, also on the meta device.

    Values of packed floats are rounded to bf16, as that library does. Raises KeyError if a tensor is missing.
    """
    scale = next((kind for kind, known in FORMATS.items() if known == layout), None)
    rows, packed = tensors["weight" if scale is None else "weight_packed"].shape
    dtype = dtype_name(torch.bfloat16 if scale else tensors["weight_scale"].dtype)
    meta = {
        "shape": (rows, 2 * packed if scale else packed),
        "element": "e2m1" if scale else "e4m3",
        "scale": scale or dtype,
        "dtype": dtype,
    }
    return Float.from_tensors(tensors, meta)
