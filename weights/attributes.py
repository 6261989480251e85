"""Numbers of heads that modules keep from config.json, where a layer's own number differs from what it says.

Sizes of linears stand under `modules` of the modelzip layout's `quantization_config`. Some forwards also count heads by
an attribute; these stand under `attributes`: {module: {attribute: whole number}}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import nn

ATTRIBUTES: Final = "attributes"
COUNTS: Final = frozenset({"num_heads", "n_heads", "num_attention_heads", "num_key_value_heads"})
DERIVED: Final = frozenset({"num_key_value_groups", "split_size", "all_head_size"})
ALLOWED: Final = COUNTS | DERIVED
"""Attributes that a checkpoint may set: numbers of heads, and what follows from these."""


def set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, int]]) -> None:
    """Set the numbers of these modules of the model, which may lack the head or have one.

    Raises ValueError for an attribute that no checkpoint may set, or that the module hasn't got.
    """
    prefix = getattr(model, "base_model_prefix", "")
    modules = dict(model.named_modules())
    for name, numbers in attributes.items():
        candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        module = next((modules[one] for one in candidates if one in modules), None)
        for key, number in numbers.items() if module is not None else ():
            if key not in ALLOWED or type(number) is not int or type(getattr(module, key, None)) is not int:
                raise ValueError(f"{name} of {type(model).__name__} has no number {key} that a checkpoint may set")
            setattr(module, key, number)
