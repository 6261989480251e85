"""How a checkpoint says which modules are compressed: compressed-tensors' config, or modelzip's own.

Of affine weights, both layouts hold the same tensors under the same names. compressed-tensors is used where every
engine that knows it reads the widths alike (2, 4 and 8 bits, plain linears), and for the floats of `float_schemes`,
which it calls otherwise (`stored_tensors`); the rest, and all other kinds of weights, needs `import modelzip.weights`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from .affine import Affine
from .float import Float
from .float_schemes import FORMATS, PLAIN, FloatScheme, portable_floats, renamed, require_readable
from .float_schemes import read as read_float
from .int8 import LAYOUT as INT8_LAYOUT
from .int8 import Int8, eight_bit_config
from .kinds import empty, from_tensors
from .value import CompressedWeight

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs

COMPRESSED_TENSORS: Final = "compressed-tensors"
MODELZIP: Final = "modelzip"
PACKED: Final = "pack-quantized"
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
    def of(cls, weight: Affine | Mapping[str, Any]) -> Scheme:
        """Of an affine weight, or of its meta."""
        meta = weight.meta() if isinstance(weight, Affine) else weight
        return cls(meta["bits"], meta["strategy"], meta["group_size"], meta["symmetric"])

    @property
    def format(self) -> str:
        """compressed-tensors' name of the layout."""
        return PACKED

    @property
    def is_made_dense(self) -> bool:
        """Whether transformers must make it dense at load. compressed-tensors 0.20 expects zero points unpacked when
        transformers makes room for packed weights, though its own layout packs them."""
        return not self.symmetric

    def arguments(self) -> QuantizationArgs:
        """compressed-tensors' words for it."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy

        return QuantizationArgs(
            num_bits=self.bits,
            symmetric=self.symmetric,
            strategy=QuantizationStrategy(self.strategy),
            group_size=self.group_size,
        )


def portable(metas: Iterable[Mapping[str, Any]], *, transposed: bool) -> bool:
    """Whether compressed-tensors holds weights of these metas alike in all its releases: integers, or floats.

    Zero points open in all of them only if the weights are made dense at load (see `quantization_config`), and
    transformers then takes one scheme for all modules.
    """
    found = list(metas)
    if found and not transposed and all(meta["kind"] == Float.kind for meta in found):
        return portable_floats(found)
    if found and all(meta["kind"] == Int8.kind for meta in found):
        return not transposed
    if transposed or any(meta["kind"] != Affine.kind for meta in found):
        return False
    distinct = {Scheme.of(meta) for meta in found}
    symmetric = all(scheme.symmetric for scheme in distinct)
    return all(scheme.bits in PORTABLE_BITS for scheme in distinct) and (symmetric or len(distinct) == 1)


def quantization_config(
    metas: Mapping[str, Mapping[str, Any]],
    *,
    layout: str,
    linears: Iterable[str],
    shared: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """What goes to config.json as `quantization_config`.

    metas: `meta()` of each compressed module's weight. linears: all `nn.Linear` of the model, of which the rest is
    named as ignored. shared: each parameter (or part of a compressed module) that isn't stored, and the one that it is.
    Raises ValueError if compressed-tensors can't hold them.
    """
    if layout == MODELZIP:
        modules = {name: dict(meta) for name, meta in metas.items()}
        return {"quant_method": MODELZIP, "version": VERSION, "modules": modules, "shared": dict(shared)}
    if shared or not portable(metas.values(), transposed=False):
        raise ValueError(f"{COMPRESSED_TENSORS} can't hold these weights")
    if any(meta["kind"] == Int8.kind for meta in metas.values()):
        return eight_bit_config(metas, linears, layout=INT8_LAYOUT, kind="int")
    schemes = {name: _scheme(meta) for name, meta in metas.items()}
    # Imported here, not above: the library takes 10 MB, and this is wanted when all else is done.
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

    common = Counter(schemes.values()).most_common()
    groups = {}
    for number, (scheme, _) in enumerate(common):
        named = [name for name in schemes if schemes[name] == scheme]
        groups[f"group_{number}"] = QuantizationScheme(
            targets=["Linear"] if number == 0 else named, weights=scheme.arguments(), format=scheme.format
        )
    config = QuantizationConfig(
        config_groups=groups,
        quantization_status=QuantizationStatus.COMPRESSED,
        format=common[0][0].format,
        ignore=[name for name in linears if name not in schemes],
    )
    # What `to_dict` gives holds types of torch, where scales are named; config.json has their names.
    written = {**config.model_dump(mode="json"), "quant_method": COMPRESSED_TENSORS}
    if opened_dense(metas.values()):
        written["dequantize"] = True
    return written


def opened_dense(metas: Iterable[Mapping[str, Any]]) -> bool:
    """Whether transformers is told to make weights of these metas dense as it opens compressed-tensors."""
    return any(meta["kind"] != Int8.kind and _scheme(meta).is_made_dense for meta in metas)


def _scheme(meta: Mapping[str, Any]) -> Scheme | FloatScheme:
    return FloatScheme.of(meta) if meta["kind"] == Float.kind else Scheme.of(meta)


def stored_tensors(weight: CompressedWeight, layout: str) -> dict[str, Tensor]:
    """What goes to safetensors of a weight in a layout, by suffix."""
    return renamed(weight) if layout == COMPRESSED_TENSORS and isinstance(weight, Float) else weight.tensors()


def decoder(config: Mapping[str, Any]) -> Callable[[str, Mapping[str, Tensor]], CompressedWeight]:
    """A function from a module's name and tensors (by suffix: `weight_packed`, ...) to its compressed weight.

    Raises ValueError if the config is of a layout that modelzip doesn't read.
    """
    method = config.get("quant_method")
    if method == MODELZIP:
        check_version(config.get("version", VERSION))
        modules = config["modules"]
        return lambda name, tensors: from_tensors(tensors, modules[name])
    layout = config.get("format")
    if method == COMPRESSED_TENSORS and layout == PACKED:
        return lambda name, tensors: Affine.from_tensors(tensors, {"bits": _bits(config, name)})
    if method == COMPRESSED_TENSORS and layout in (PLAIN, *FORMATS.values()):
        for group in config.get("config_groups", {}).values():
            require_readable(group, layout)
        return lambda name, tensors: read_float(tensors, layout)
    if method == COMPRESSED_TENSORS and rounds_inputs(config):
        return lambda name, tensors: Int8.from_tensors(tensors, {})
    raise ValueError(f"quantized as {method}{f' {layout}' if layout else ''}")


def stored(
    config: Mapping[str, Any], name: str, parts: Mapping[str, Tensor], shape: tuple[int, int]
) -> CompressedWeight:
    """The weight, on the meta device, of a module that a checkpoint holds compressed.

    parts: its tensors by suffix, of which shape and dtype are looked at. shape: (out, in) of the module. Raises
    ValueError if the config is of a layout that modelzip doesn't read.
    """
    decode = decoder(config)
    if config["quant_method"] == MODELZIP:
        return empty(config["modules"][name])
    on_meta = {suffix: tensor.to("meta") for suffix, tensor in parts.items()}
    if config["format"] != PACKED:
        return decode(name, on_meta)
    return Affine.from_tensors(on_meta, {"bits": _bits(config, name), "shape": shape})


def rounds_inputs(config: Mapping[str, Any]) -> bool:
    """Whether the linears that are stored compressed round their inputs to 8 bits, by token, as they come."""
    if config.get("quant_method") != COMPRESSED_TENSORS or config.get("format") != INT8_LAYOUT:
        return False
    groups = config.get("config_groups", {}).values()
    sides = [(group.get("weights") or {}, group.get("input_activations") or {}) for group in groups]
    return bool(sides) and all(
        weights.get("strategy") == "channel"
        and inputs.get("strategy") == "token"
        and bool(inputs.get("dynamic"))
        and all(
            one.get("num_bits") == 8 and one.get("type") == "int" and one.get("symmetric") for one in (weights, inputs)
        )
        for weights, inputs in sides
    )


def shared_parts(module: str, owner: str, meta: Mapping[str, Any]) -> dict[str, str]:
    """Entries of `shared` by which one compressed module has all tensors of its weight from another."""
    return {f"{module}.{suffix}": f"{owner}.{suffix}" for suffix in empty(meta).tensors()}


def check_version(version: int) -> None:
    """Raises ValueError if the layout is newer than what is installed."""
    if version > VERSION:
        raise ValueError(f"this model is in layout version {version} of modelzip; installed is version {VERSION}")


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
