"""Which layout the output gets: compressed-tensors where plain transformers opens it, else modelzip's own.

Whether transformers can open a model of this class is tried on the meta device, before any work is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from modelzip.checkpoints.blocks import Structure
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.checkpoints.skeleton import skeleton
from modelzip.weights.affine import Affine
from modelzip.weights.experts import UNFUSED
from modelzip.weights.float import Float
from modelzip.weights.inputs import InputRounding, rounds_of_weight
from modelzip.weights.int8 import Int8
from modelzip.weights.layouts import COMPRESSED_TENSORS, MODELZIP, portable
from modelzip.weights.rounded_inputs import RoundedInputs
from modelzip.weights.value import CompressedWeight

_HELD: Final = {
    Affine.kind: "compressed-tensors holds 2, 4 and 8 bits in plain linears, and zero points with one scheme for all",
    Int8.kind: "compressed-tensors holds integers of 8 bits in plain linears, inputs rounded in one way for all",
    Float.kind: "compressed-tensors holds fp8 e4m3 with a scale a row or a matrix in plain linears, or mxfp4 or nvfp4",
}


def choose_layout(
    asked: str,
    weights: Mapping[str, CompressedWeight],
    structure: Structure,
    *,
    checkpoint: Checkpoint,
    names: NameMap,
) -> tuple[str, str]:
    """The layout for these compressed modules, and why it isn't compressed-tensors ("" if it could be).

    asked: the stage's setting, `auto` or a layout, which is then kept.
    """
    transposed = any(
        linear.transposed for block in structure.blocks for linear in block.linears if linear.name in weights
    )
    if not weights:
        return COMPRESSED_TENSORS if asked == "auto" else asked, ""
    reason = ""
    bare = [weight.inner if isinstance(weight, RoundedInputs) else weight for weight in weights.values()]
    kinds = {weight.kind for weight in bare}
    other = next((kind for kind in kinds if kind not in _HELD), None)
    if other is not None:
        reason = f"compressed-tensors holds no {other.replace('_', '-')} weights"
    elif len(kinds) > 1:
        reason = "compressed-tensors has one layout for all: integers or floats"
    elif any(meta and meta["form"] != InputRounding.form for meta in (one.meta().get("inputs") for one in bare)):
        reason = "compressed-tensors has no word for inputs of which some columns stay exact"
    elif reason := _own_layout(checkpoint, weights, structure):
        pass
    elif not portable((weight.meta() for weight in weights.values()), transposed=transposed):
        reason = _HELD[next(iter(kinds))]
        if any(rounds_of_weight(weight) is not None for weight in weights.values()):
            reason += "; with rounded inputs, of 8-bit integers for integers without zero points, or fp8 for either"
    elif asked != MODELZIP:
        reason = _obstacle(checkpoint, names, weights)
    if asked != "auto":
        return asked, reason
    return MODELZIP if reason else COMPRESSED_TENSORS, reason


def _own_layout(checkpoint: Checkpoint, weights: Mapping[str, CompressedWeight], structure: Structure) -> str:
    """What only modelzip's own layout says of the checkpoint as it is or will be, or ""."""
    config = checkpoint.quantization or {}
    linears = {linear.name: linear for block in structure.blocks for linear in block.linears}
    if config.get(UNFUSED):
        return "transformers opens experts one by one through modelzip alone"
    if config.get("shared") or any(linears[name].sharers for name in weights if name in linears):
        return "compressed-tensors holds no shared weights"
    own = config.get("modules", {}) if config.get("quant_method") == MODELZIP else {}
    if not linears.keys() >= weights.keys() | own.keys():
        return "compressed-tensors holds no embeddings"
    known = {*_HELD, RoundedInputs.kind}
    if any(meta["kind"] not in known for meta in config.get("modules", {}).values()):
        return "compressed-tensors holds no linears of other sizes than config.json says"
    return ""


def _obstacle(checkpoint: Checkpoint, names: NameMap, compressed: Iterable[str]) -> str:
    """Why transformers couldn't open this model with these modules in compressed-tensors' layout, or ""."""
    model: Any = skeleton(checkpoint)
    if any(names.conversion(name) is not None for name in model.state_dict()):
        # Its loader puts a decompression in front of every converter, which drops tensors that aren't compressed.
        return "transformers can't open compressed-tensors beside dense experts that are stored one by one"
    for name in compressed:
        del model.get_submodule(name)._parameters["weight"]
    for module in model.modules():
        module._is_hf_initialized = False
    try:
        # What the loader calls in the end. Some classes reach from a parent into the linears' weights there.
        model.initialize_weights()
    except AttributeError:
        return f"transformers' {type(model).__name__} needs its linears' dense weights to open"
    return ""
