"""config.json of a model with some of its layers, counted anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.rewrite import with_number
from modelzip.weights.attributes import ATTRIBUTES
from modelzip.weights.experts import UNFUSED


def require_countable(config: Any) -> None:
    """Raise CheckpointError for a model whose layers do something else under another number. config: transformers'."""
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise CheckpointError("its attention is scaled by the layer's number, so layers can't be counted anew")


def counted_anew(
    written: Mapping[str, Any], config: Any, kept: Sequence[int], *, keys: Sequence[str] = ()
) -> dict[str, Any]:
    """What config.json says once the layers `kept` are all there are, in that order.

    written: as it is. config: as transformers reads it, with what isn't written out; what is said layer by layer (kinds
    of attention, which layers have no experts) moves along with its layer. keys: of the number of layers, transformers'
    own without.
    """
    before = config.to_dict()
    names = keys or (config.attribute_map.get("num_hidden_layers", "num_hidden_layers"),)
    layers = next((before[name] for name in names if isinstance(before.get(name), int)), None)
    found = dict(written)
    for name in names:
        if isinstance(before.get(name), int):
            found = with_number(found, config.attribute_map, name, len(kept))
    for name, value in before.items() if not keys else ():
        if name == "mlp_only_layers" and value:
            found[name] = [number for number, old in enumerate(kept) if old in value]
        elif "layer" in name and isinstance(value, list) and len(value) == layers:
            found[name] = [value[old] for old in kept]
    return found


def renumbered(quantization: Mapping[str, Any], path: str, kept: Sequence[int]) -> dict[str, Any]:
    """The quantization config of what is left, modules of layers under their new numbers.

    path: of the list of layers. Raises CheckpointError if a layer that stays shares a tensor that a layer that goes
    owns.
    """
    found = dict(quantization)
    for key in ("modules", ATTRIBUTES):
        if key in quantization:
            found[key] = _renamed(quantization[key], path, kept)
    if UNFUSED in quantization:
        found[UNFUSED] = list(_renamed(dict.fromkeys(quantization[UNFUSED]), path, kept))
    if "shared" in quantization:
        found["shared"] = {}
        for target, owner in _renamed(quantization["shared"], path, kept).items():
            (renamed,) = _renamed({owner: ""}, path, kept) or (None,)
            if renamed is None:
                raise CheckpointError(f"{target} is shared with {owner}, which is in a layer that would go")
            found["shared"][target] = renamed
    return found


def _renamed(entries: Mapping[str, Any], path: str, kept: Sequence[int]) -> dict[str, Any]:
    """Entries by module name, those of layers under their new numbers."""
    new = {str(old): str(number) for number, old in enumerate(kept)}
    found = {}
    for name, value in entries.items():
        old, _, rest = name.removeprefix(f"{path}.").partition(".")
        if not name.startswith(f"{path}."):
            found[name] = value
        elif old in new:
            found[f"{path}.{new[old]}.{rest}"] = value
    return found
