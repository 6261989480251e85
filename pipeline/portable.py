"""Which layout the output gets: compressed-tensors where plain transformers opens it, else modelzip's own.

Whether transformers can open a model of this class is tried on the meta device, before any work is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from modelzip.checkpoints.blocks import Structure, skeleton
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.weights.layouts import COMPRESSED_TENSORS, MODELZIP, portable


def choose_layout(
    asked: str, metas: Mapping[str, Mapping[str, Any]], structure: Structure, *, checkpoint: Checkpoint, names: NameMap
) -> tuple[str, str]:
    """The layout for these compressed modules, and why it isn't compressed-tensors ("" if it could be).

    asked: the stage's setting, `auto` or a layout, which is then kept.
    """
    transposed = any(
        linear.transposed for block in structure.blocks for linear in block.linears if linear.name in metas
    )
    reason = ""
    if not portable(metas.values(), transposed=transposed):
        reason = "compressed-tensors holds 2, 4 and 8 bits in plain linears, and zero points with one scheme for all"
    elif asked != MODELZIP:
        reason = _obstacle(checkpoint, names, metas)
    if asked != "auto":
        return asked, reason
    return MODELZIP if reason else COMPRESSED_TENSORS, reason


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
