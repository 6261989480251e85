"""How compressed-tensors says that linears round their inputs: its words for `InputRounding`, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from .inputs import FLAT_ALIKE, TOKEN_INT8, InputRounding

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

_TYPES: Final = MappingProxyType({"int8": "int", "fp8": "float"})


def input_arguments(inputs: Mapping[str, Any]) -> QuantizationArgs:
    """compressed-tensors' words for the `meta` of an InputRounding."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType

    is_dynamic = inputs["scale"] is None
    return QuantizationArgs(
        num_bits=8,
        type=QuantizationType(_TYPES[inputs["number"]]),
        symmetric=True,
        strategy=QuantizationStrategy.TOKEN if is_dynamic else QuantizationStrategy.TENSOR,
        dynamic=is_dynamic,
    )


def read_inputs(group: Mapping[str, Any], scale_dtype: str) -> dict[str, Any] | None:
    """The `meta` of what a group of compressed-tensors' config says of inputs; None if they aren't rounded.

    Raises ValueError for what `InputRounding` doesn't do.
    """
    if group.get("output_activations"):
        raise ValueError("quantized as compressed-tensors with rounded outputs")
    asked = group.get("input_activations")
    if not asked:
        return None
    number = next((name for name, type_ in _TYPES.items() if type_ == asked.get("type")), None)
    strategy, is_dynamic = asked.get("strategy"), asked.get("dynamic")
    fits = (strategy == "token" and is_dynamic is True) or (strategy == "tensor" and not is_dynamic)
    if number is None or asked.get("num_bits") != 8 or not asked.get("symmetric") or not fits:
        kind = f"{asked.get('num_bits')} bit {asked.get('type')} by {strategy}"
        raise ValueError(f"quantized as compressed-tensors with inputs of {kind}")
    meta = {"form": InputRounding.form, "number": number, "scale": None if is_dynamic else scale_dtype}
    return {**meta, FLAT_ALIKE: True}


def group_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The group that covers a linear, in compressed-tensors' order: by its name, by a pattern, by its class.

    Raises ValueError if no group does.
    """
    groups = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    patterns = (t for t in sorted(groups) if t.startswith("re:") and re.match(t.removeprefix("re:"), name))
    target = next((target for target in (name, *patterns, "Linear") if target in groups), None)
    if target is None:
        raise ValueError(f"quantized as compressed-tensors with no group for {name}")
    found: Mapping[str, Any] = groups[target]
    return found


def eight_bit_config(
    names: Iterable[str],
    linears: Iterable[str],
    *,
    layout: str,
    kind: str,
    inputs: Mapping[str, Any] = MappingProxyType(TOKEN_INT8.meta()),
) -> dict[str, Any]:
    """compressed-tensors' `quantization_config` of linears of 8 bits, a scale a row, with inputs rounded to 8 bits too.

    names: of these linears. linears: of all in the model. layout, kind: compressed-tensors' words for the format and
    the type. inputs: the meta of how these are rounded, of the same type.
    """
    # Imported here, not above: the library takes 10 MB, and this is wanted when all else is done.
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        QuantizationStrategy,
        QuantizationType,
    )

    common: dict[str, Any] = {"num_bits": 8, "type": QuantizationType(kind), "symmetric": True}
    weights = QuantizationArgs(**common, strategy=QuantizationStrategy.CHANNEL)
    activations = input_arguments({**inputs, "number": "int8" if kind == "int" else "fp8"})
    group = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations, format=layout)
    chosen = set(names)
    config = QuantizationConfig(
        config_groups={"group_0": group},
        quantization_status=QuantizationStatus.COMPRESSED,
        format=layout,
        ignore=[name for name in linears if name not in chosen],
    )
    return {**config.to_dict(), "quant_method": "compressed-tensors"}
