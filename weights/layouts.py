"""How a checkpoint says which modules are compressed: compressed-tensors' config, or modelzip's own.

Both layouts hold the same tensors under the same names. compressed-tensors is used where every engine that knows it
reads the widths alike (2, 4 and 8 bits, plain linears); the rest needs `import modelzip.weights`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from .affine import Affine

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

COMPRESSED_TENSORS: Final = "compressed-tensors"
MODELZIP: Final = "modelzip"
PORTABLE_BITS: Final = frozenset({2, 4, 8})
VERSION: Final = 1


@dataclass(frozen=True)
class Scheme:
    """The grid of one compressed module. strategy: what shares a scale: `tensor`, `channel` or `group`."""

    bits: int
    strategy: str
    group_size: int | None
    symmetric: bool

    @classmethod
    def of(cls, weight: Affine) -> Scheme:
        group_size = weight.group_size if weight.strategy == "group" else None
        return cls(weight.bits, weight.strategy, group_size, weight.zero_point is None)


def portable(schemes: Iterable[Scheme], *, transposed: bool) -> bool:
    """Whether compressed-tensors' `pack-quantized` layout holds these modules alike in all its releases.

    Zero points open in all of them only if the weights are made dense at load (see `quantization_config`), and
    transformers then takes one scheme for all modules.
    """
    distinct = set(schemes)
    symmetric = all(scheme.symmetric for scheme in distinct)
    return not transposed and all(s.bits in PORTABLE_BITS for s in distinct) and (symmetric or len(distinct) == 1)


def quantization_config(
    schemes: Mapping[str, Scheme], *, layout: str, linears: Iterable[str], scale_dtype: torch.dtype
) -> dict[str, Any]:
    """What goes to config.json as `quantization_config`.

    schemes: of each compressed module. linears: all `nn.Linear` of the model, of which the rest is named as ignored.
    """
    if layout == MODELZIP:
        modules = {name: {"kind": Affine.kind, **asdict(scheme)} for name, scheme in schemes.items()}
        return {
            "quant_method": MODELZIP,
            "version": VERSION,
            "scale_dtype": str(scale_dtype).removeprefix("torch."),
            "modules": modules,
        }
    # Imported here, not above: the library takes 10 MB, and this is wanted when all else is done.
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

    common = Counter(schemes.values()).most_common()
    groups = {}
    for number, (scheme, _) in enumerate(common):
        named = [name for name in schemes if schemes[name] == scheme]
        groups[f"group_{number}"] = QuantizationScheme(
            targets=["Linear"] if number == 0 else named, weights=_arguments(scheme), format="pack-quantized"
        )
    config = QuantizationConfig(
        config_groups=groups,
        quantization_status=QuantizationStatus.COMPRESSED,
        format="pack-quantized",
        ignore=[name for name in linears if name not in schemes],
    )
    written = {**config.to_dict(), "quant_method": COMPRESSED_TENSORS}
    if not all(scheme.symmetric for scheme in schemes.values()):
        # compressed-tensors 0.20 expects zero points unpacked when transformers makes room for packed weights, though
        # its own layout packs them; made dense at load, they are read right by every release.
        written["dequantize"] = True
    return written


def _arguments(scheme: Scheme) -> QuantizationArgs:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy

    return QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy=QuantizationStrategy(scheme.strategy),
        group_size=scheme.group_size,
    )


def decoder(config: Mapping[str, Any]) -> Callable[[str, Mapping[str, Tensor]], Affine]:
    """A function from a module's name and tensors (by suffix: `weight_packed`, ...) to its compressed weight.

    Raises ValueError if the config is of a layout that modelzip doesn't read.
    """
    method = config.get("quant_method")
    if method == MODELZIP:
        modules = config["modules"]
        return lambda name, tensors: Affine.from_tensors(tensors, {"bits": modules[name]["bits"]})
    if method == COMPRESSED_TENSORS and config.get("format") == "pack-quantized":
        return lambda name, tensors: Affine.from_tensors(tensors, {"bits": _bits(config, name)})
    raise ValueError(f"quantized as {method}{' ' + str(config['format']) if config.get('format') else ''}")


def stored_scheme(config: Mapping[str, Any], name: str, shapes: Mapping[str, tuple[int, ...]], columns: int) -> Scheme:
    """The scheme of a module that a checkpoint holds compressed, from its config and its tensors' shapes by suffix.

    Raises ValueError if the config is of a layout that modelzip doesn't read.
    """
    decoder(config)
    bits = config["modules"][name]["bits"] if config["quant_method"] == MODELZIP else _bits(config, name)
    scale = shapes["weight_scale"]
    symmetric = "weight_zero_point" not in shapes
    if len(scale) < 2:
        return Scheme(bits, "tensor", None, symmetric)
    if scale[1] == 1:
        return Scheme(bits, "channel", None, symmetric)
    return Scheme(bits, "group", columns // scale[1], symmetric)


def _bits(config: Mapping[str, Any], name: str) -> int:
    """Bits of the group that covers a linear, in compressed-tensors' order: by its name, by a pattern, by its class.

    Raises ValueError if no group does.
    """
    groups = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    patterns = (t for t in sorted(groups) if t.startswith("re:") and re.match(t.removeprefix("re:"), name))
    target = next((target for target in (name, *patterns, "Linear") if target in groups), None)
    if target is None:
        raise ValueError(f"quantized as {COMPRESSED_TENSORS} with no group for {name}")
    return int(groups[target]["weights"]["num_bits"])
