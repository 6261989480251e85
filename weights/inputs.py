"""What becomes of inputs before a product: rounded as they come, by token or with one scale that was found before.

A weight of a kind that rounds its inputs has `inputs` and `round_inputs`; its product is that of the rounded inputs
with the dense matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol, TypeAlias

import torch
from torch import Tensor

from .value import CompressedWeight, dtype_name, named_dtype

Rounds = Callable[[Tensor], Tensor]

PREFIX: Final = "weight_input_"
"""What the names of tensors begin with that say how inputs are rounded, in modelzip's own layout."""

SCALE: Final = "input_scale"
"""compressed-tensors' name of the one scale of all inputs."""

FLAT_ALIKE: Final = "flat_alike"
"""What is said beside the `meta` of inputs that are read from compressed-tensors."""

HALF_RANGE: Final = MappingProxyType({"int8": 127.5, "fp8": 448.0})
"""Half of what lies between the lowest and the highest number: the integers of 8 bits, the floats E4M3."""


class Inputs(Protocol):
    """How inputs are rounded: a value that a weight holds as `inputs`."""

    form: ClassVar[str]

    def rounded(self, x: Tensor) -> Tensor:
        """x [..., in] as it is multiplied, in x's dtype."""

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors, in names that begin with PREFIX."""

    def meta(self) -> dict[str, Any]:
        """Plain data, `form` among them."""


@dataclass(frozen=True)
class InputRounding:
    """Inputs as whole numbers of 8 bits or as floats E4M3, times a scale.

    number: a name of HALF_RANGE. scale: [1], one for all inputs; None for one to each token, such that its largest
    magnitude is half the range. flat_alike: all tokens of a matrix [tokens, in] have one scale, as compressed-tensors
    has it in transformers; no part of `meta`, since it belongs to that layout.
    """

    number: str
    scale: Tensor | None = None
    flat_alike: bool = False

    form: ClassVar[str] = "rounded"

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers [..., in] in x's dtype, and scales [..., 1] or [1], for x [..., in].

        Computed in x's dtype, as compressed-tensors does.
        """
        scale = self._of_tokens(x) if self.scale is None else self.scale.to(x.dtype)
        scaled = x / scale
        if self.number == "int8":
            return scaled.clamp_(-128, 127).round_(), scale
        most = HALF_RANGE[self.number]
        return scaled.clamp_(-most, most).to(torch.float8_e4m3fn).to(x.dtype), scale

    def exact(self, x: Tensor) -> None:
        """No columns stay as they are."""

    def rounded(self, x: Tensor) -> Tensor:
        """x [..., in] as the numbers of `codes` stand for it."""
        codes, scale = self.codes(x)
        return codes.mul_(scale)

    def _of_tokens(self, x: Tensor) -> Tensor:
        is_one = self.flat_alike and x.ndim == 2
        largest = x.abs().amax().reshape(1, 1) if is_one else x.abs().amax(-1, keepdim=True)
        scale = largest / torch.tensor(HALF_RANGE[self.number], dtype=x.dtype, device=x.device)
        return torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)

    def tensors(self) -> dict[str, Tensor]:
        """What goes to safetensors."""
        return {} if self.scale is None else {f"{PREFIX}scale": self.scale}

    def meta(self) -> dict[str, Any]:
        """Plain data; scale: its dtype, None for scales by token."""
        return {
            "form": self.form,
            "number": self.number,
            "scale": None if self.scale is None else dtype_name(self.scale.dtype),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> InputRounding:
        """Read back what `tensors` gave, or what compressed-tensors calls it. Raises KeyError if it is missing."""
        if meta["scale"] is None:
            return cls(meta["number"], flat_alike=bool(meta.get(FLAT_ALIKE)))
        return cls(meta["number"], tensors[SCALE] if SCALE in tensors else tensors[f"{PREFIX}scale"])

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> InputRounding:
        """On the meta device."""
        if meta["scale"] is None:
            return cls(meta["number"])
        return cls(meta["number"], torch.empty(1, dtype=named_dtype(meta["scale"]), device="meta"))


@dataclass(frozen=True)
class OutlierRounding:
    """Inputs as integers of 8 bits times a scale a token, but for whole columns in which any token's magnitude reaches
    `threshold`: these stay as they are, and have no say in the scales.

    Dettmers, Lewis, Belkada, Zettlemoyer 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
    section 3.2. All tokens of a product are looked at together, so what else is in a batch has a say, as there.
    """

    threshold: float

    form: ClassVar[str] = "beside_outliers"
    number: ClassVar[str] = "int8"
    scale: ClassVar[None] = None

    def exact(self, x: Tensor) -> Tensor:
        """The columns of x [..., in] that stay as they are, int64 [count]."""
        return (x.abs() >= self.threshold).reshape(-1, x.shape[-1]).any(0).nonzero().flatten()

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integers in fp32 [..., in], 0 in the exact columns, and scales fp32 [..., 1], for x [..., in]."""
        kept = x.float().index_fill(-1, self.exact(x), 0)
        scale = kept.abs().amax(-1, keepdim=True) / 127
        scale = torch.where(scale == 0, 1.0, scale)
        return (kept / scale).round_(), scale

    def rounded(self, x: Tensor) -> Tensor:
        """x [..., in] with all but its exact columns as integers stand for it."""
        codes, scale = self.codes(x)
        made = codes.mul_(scale).to(x.dtype)
        columns = self.exact(x)
        return made.index_copy_(-1, columns, x.index_select(-1, columns))

    def tensors(self) -> dict[str, Tensor]:
        """None: which columns these are is found anew for each product."""
        return {}

    def meta(self) -> dict[str, Any]:
        """Plain data."""
        return {"form": self.form, "number": self.number, "threshold": self.threshold}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> OutlierRounding:
        """Read back what `meta` gave."""
        return cls(float(meta["threshold"]))

    @classmethod
    def empty(cls, meta: Mapping[str, Any]) -> OutlierRounding:
        """The same: it has no tensors."""
        return cls(float(meta["threshold"]))


TOKEN_INT8: Final = InputRounding("int8")


def fixed_scale(number: str, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale [1] by which inputs of magnitudes up to `largest` (any shape) span the range, in `dtype`."""
    scale = (largest.amax().reshape(1) / HALF_RANGE[number]).to(dtype)
    return torch.where(scale == 0, torch.finfo(dtype).eps, scale)


IntegerInputs: TypeAlias = InputRounding | OutlierRounding
"""What a matrix of 8-bit integers is multiplied with."""


def integer_form(meta: Mapping[str, Any]) -> type[IntegerInputs]:
    """By the `meta` of one. Raises ValueError for other forms."""
    forms: dict[str, type[IntegerInputs]] = {one.form: one for one in (InputRounding, OutlierRounding)}
    if meta["form"] not in forms:
        raise ValueError(f"inputs of the form {meta['form']!r}; it must be one of {', '.join(forms)}")
    return forms[meta["form"]]


def says_of_inputs(suffix: str) -> bool:
    """Whether a tensor of a compressed module says how inputs are rounded."""
    return suffix == SCALE or suffix.startswith(PREFIX)


def rounds_of_weight(weight: CompressedWeight) -> Rounds | None:
    """What a weight does to its inputs before the product; None if it takes them as they come."""
    return getattr(weight, "round_inputs", None)


def straight_through(rounds: Rounds) -> Rounds:
    """The same, with the gradient of leaving inputs as they are.

    Bengio, Léonard, Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
    Computation".
    """

    def rounded(x: Tensor) -> Tensor:
        made = rounds(x.detach())
        return x + (made - x.detach()) if torch.is_grad_enabled() and x.requires_grad else made

    return rounded
