"""config.json of a model with some of its layers, counted anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.rewrite import with_number


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
