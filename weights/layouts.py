"""How a checkpoint says which modules are compressed: compressed-tensors' config, or modelzip's own.

Of affine weights, both layouts hold the same tensors under the same names. compressed-tensors is used where every
engine that knows it reads the widths alike (2, 4 and 8 bits, plain linears), and for the floats of `float_schemes`,
which it calls otherwise (`stored_tensors`); the rest, and all other kinds of weights, needs `import modelzip.weights`.
"""

from __future__ import annotations

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
from .input_forms import inputs_from
from .input_schemes import eight_bit_config, group_of, input_arguments, read_inputs
from .inputs import PREFIX, SCALE, InputRounding, Inputs
from .int8 import LAYOUT as INT8_LAYOUT
from .int8 import Int8
from .kinds import empty, from_tensors
from .rounded_inputs import RoundedInputs
from .value import CompressedWeight, dtype_name

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
    transformers then takes one scheme for all modules, and leaves inputs as they come. Inputs of all are rounded in one
    way, or of none.
    """
    found = list(metas)
    ways = {_way(meta) for meta in found}
    if not found or transposed or len(ways) > 1 or None in ways:
        return False
    rounds = ways != {""}
    if all(meta["kind"] == Int8.kind for meta in found):
        return ways <= {"int8", "int8 static"}
    bare = [_bare(meta) for meta in found]
    if all(meta["kind"] == Float.kind for meta in bare):
        schemes = {FloatScheme.of(meta) for meta in bare}
        fits = not rounds or (ways <= {"fp8", "fp8 static"} and not any(scheme.is_made_dense for scheme in schemes))
        return fits and portable_floats(bare)
    if any(meta["kind"] != Affine.kind for meta in bare):
        return False
    distinct = {Scheme.of(meta) for meta in bare}
    symmetric = all(scheme.symmetric for scheme in distinct)
    return all(scheme.bits in PORTABLE_BITS for scheme in distinct) and (
        symmetric or (len(distinct) == 1 and not rounds)
    )


def _way(meta: Mapping[str, Any]) -> str | None:
    """How inputs are rounded, "" where they aren't; None for what compressed-tensors has no word for."""
    inputs = meta.get("inputs")
    if inputs is None:
        return ""
    if inputs["form"] != InputRounding.form:
        return None
    return str(inputs["number"]) + ("" if inputs["scale"] is None else " static")


def _bare(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the matrix alone, without what becomes of inputs."""
    inner: Mapping[str, Any] = meta["inner"] if meta["kind"] == RoundedInputs.kind else meta
    return inner


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
    inputs = next(iter(metas.values())).get("inputs")
    if any(meta["kind"] == Int8.kind for meta in metas.values()):
        return eight_bit_config(metas, linears, layout=INT8_LAYOUT, kind="int", inputs=inputs or {})
    schemes = {name: _scheme(_bare(meta)) for name, meta in metas.items()}
    # Imported here, not above: the library takes 10 MB, and this is wanted when all else is done.
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

    common = Counter(schemes.values()).most_common()
    groups = {}
    for number, (scheme, _) in enumerate(common):
        named = [name for name in schemes if schemes[name] == scheme]
        groups[f"group_{number}"] = QuantizationScheme(
            targets=["Linear"] if number == 0 else named,
            weights=scheme.arguments(),
            input_activations=None if inputs is None else input_arguments(inputs),
            format=scheme.format,
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
    bare = (_bare(meta) for meta in metas)
    return any(_scheme(meta).is_made_dense for meta in bare if meta["kind"] in (Affine.kind, Float.kind))


def _scheme(meta: Mapping[str, Any]) -> Scheme | FloatScheme:
    return FloatScheme.of(meta) if meta["kind"] == Float.kind else Scheme.of(meta)


def stored_tensors(weight: CompressedWeight, layout: str) -> dict[str, Tensor]:
    """What goes to safetensors of a weight in a layout, by suffix."""
    if layout != COMPRESSED_TENSORS:
        return weight.tensors()
    if isinstance(weight, RoundedInputs):
        return {**stored_tensors(weight.inner, layout), **_input_scale(weight.inputs)}
    if isinstance(weight, Int8):
        return {"weight": weight.codes, "weight_scale": weight.scale, **_input_scale(weight.inputs)}
    return renamed(weight) if isinstance(weight, Float) else weight.tensors()


def _input_scale(inputs: Inputs) -> dict[str, Tensor]:
    return {SCALE if suffix == f"{PREFIX}scale" else suffix: tensor for suffix, tensor in inputs.tensors().items()}


def decoder(config: Mapping[str, Any]) -> Callable[[str, Mapping[str, Tensor]], CompressedWeight]:
    """A function from a module's name and tensors (by suffix: `weight_packed`, ...) to its compressed weight.

    Raises ValueError if the config is of a layout that modelzip doesn't read.
    """
    method = config.get("quant_method")
    if method == MODELZIP:
        check_version(config.get("version", VERSION))
        modules = config["modules"]
        return lambda name, tensors: from_tensors(tensors, modules[name])
    layout = str(config.get("format"))
    groups = config.get("config_groups", {}).values()
    if method == COMPRESSED_TENSORS and (layout == PACKED or layout in (PLAIN, *FORMATS.values())):
        for group in groups:
            read_inputs(group, "")
            if layout != PACKED:
                require_readable(group, layout)
        return lambda name, tensors: _with_inputs(_decoded(config, name, tensors), config, name, tensors)
    if method == COMPRESSED_TENSORS and _holds_int8(config):
        return lambda name, tensors: Int8.from_tensors(tensors, {"inputs": input_meta(config, name, tensors)})
    raise ValueError(f"quantized as {method}{f' {layout}' if config.get('format') else ''}")


def _decoded(config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> Affine | Float:
    if config["format"] == PACKED:
        return Affine.from_tensors(tensors, {"bits": _bits(config, name)})
    return read_float(tensors, config["format"])


def _with_inputs(
    weight: Affine | Float, config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
) -> CompressedWeight:
    inputs = input_meta(config, name, tensors)
    return weight if inputs is None else RoundedInputs(weight, InputRounding.from_tensors(tensors, inputs))


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
    weight = Affine.from_tensors(on_meta, {"bits": _bits(config, name), "shape": shape})
    return _with_inputs(weight, config, name, on_meta)


def rounds_inputs(config: Mapping[str, Any]) -> bool:
    """Whether some linears that are stored compressed round their inputs as they come."""
    if config.get("quant_method") == MODELZIP:
        return any(meta.get("inputs") for meta in config["modules"].values())
    if config.get("quant_method") != COMPRESSED_TENSORS:
        return False
    return any(group.get("input_activations") for group in config.get("config_groups", {}).values())


def input_meta(config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The `meta` of how a compressed module's inputs are rounded, None if they aren't. tensors: its own, by suffix.

    Raises ValueError for what modelzip doesn't know.
    """
    if config.get("quant_method") == MODELZIP:
        found = config["modules"].get(name, {}).get("inputs")
        return None if found is None else dict(found)
    scale = tensors.get(SCALE)
    return read_inputs(group_of(config, name), "" if scale is None else dtype_name(scale.dtype))


def inputs_of(config: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> Inputs | None:
    """How a compressed module rounds its inputs. tensors: those of its own that `says_of_inputs` names, by suffix."""
    meta = input_meta(config, name, tensors)
    return None if meta is None else inputs_from(tensors, meta)


def _holds_int8(config: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors holds plain integers of 8 bits, a scale a row, for inputs of 8-bit integers."""
    groups = list(config.get("config_groups", {}).values())
    if config.get("format") != INT8_LAYOUT or not groups:
        return False
    asked = {"strategy": "channel", "num_bits": 8, "type": "int", "symmetric": True}
    weights = [group.get("weights") or {} for group in groups]
    are_int8 = all(one.get(key) == value for one in weights for key, value in asked.items())
    return are_int8 and all((read_inputs(group, "") or {}).get("number") == "int8" for group in groups)


def shared_parts(module: str, owner: str, meta: Mapping[str, Any]) -> dict[str, str]:
    """Entries of `shared` by which one compressed module has all tensors of its weight from another."""
    return {f"{module}.{suffix}": f"{owner}.{suffix}" for suffix in empty(meta).tensors()}


def check_version(version: int) -> None:
    """Raises ValueError if the layout is newer than what is installed."""
    if version > VERSION:
        raise ValueError(f"this model is in layout version {version} of modelzip; installed is version {VERSION}")


def _bits(config: Mapping[str, Any], name: str) -> int:
    return int(group_of(config, name)["weights"]["num_bits"])
