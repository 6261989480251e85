"""What the linears of a checkpoint are, plain or compressed, from its headers."""

from __future__ import annotations

import torch

from modelzip.checkpoints.blocks import Structure
from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import DTYPES, Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.weights.dense import Dense
from modelzip.weights.layouts import MODELZIP, decoder, stored
from modelzip.weights.value import CompressedWeight


def weights_now(checkpoint: Checkpoint, structure: Structure, names: NameMap) -> dict[str, CompressedWeight]:
    """What each linear of the blocks is in the checkpoint, on the meta device.

    Raises CheckpointError for layouts that modelzip doesn't read.
    """
    config = checkpoint.quantization
    try:
        decoder(config or {"quant_method": MODELZIP, "modules": {}})
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.source} is already {error}, which modelzip can't take as input: give the original model."
        ) from None
    found: dict[str, CompressedWeight] = {}
    for linear in (linear for block in structure.blocks for linear in block.linears):
        parts = names.parts(linear.name)
        if parts:
            assert config is not None
            shapes = {suffix: checkpoint.tensors[name] for suffix, name in parts.items()}
            empty = {s: torch.empty(t.shape, dtype=DTYPES[t.dtype], device="meta") for s, t in shapes.items()}
            found[linear.name] = stored(config, linear.name, empty, linear.shape)
        else:
            dtype = DTYPES[checkpoint.tensors[linear.tensor].dtype]
            found[linear.name] = Dense(torch.empty(linear.shape, dtype=dtype, device="meta"))
    return found
