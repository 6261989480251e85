"""A checkpoint as a model with all its weights in memory, compressed ones made dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelzip.weights.inputs import Rounds, says_of_inputs, straight_through
from modelzip.weights.layouts import MODELZIP, decoder, inputs_of, rounds_inputs
from modelzip.weights.value import CompressedWeight

from .errors import CheckpointError
from .index import Checkpoint
from .names import NameMap
from .reader import Decode, materialise, move_buffers
from .skeleton import skeleton
from .streamed import RoundsOf


def decode_of(checkpoint: Checkpoint) -> Decode | None:
    """What makes the checkpoint's compressed weights dense; None where there are none."""
    config = checkpoint.quantization
    if config is None:
        return None
    try:
        compressed = decoder(config)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.source} is {error}, which modelzip doesn't read: it reads its own outputs and what "
            "compressed-tensors packs of weights alone."
        ) from None

    def dense(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        return compressed(name, tensors).dense(torch.float32)

    return dense


def rounds_of(checkpoint: Checkpoint, device: torch.device) -> RoundsOf | None:
    """What the checkpoint's compressed linears do to their inputs; None where all take them as they come."""
    config = checkpoint.quantization
    if config is None or not rounds_inputs(config):
        return None

    def rounds(name: str, parts: Mapping[str, str]) -> Rounds | None:
        told = {suffix: tensor for suffix, tensor in parts.items() if says_of_inputs(suffix)}
        read = checkpoint.read(told.values(), device=device)
        inputs = inputs_of(config, name, {suffix: read[tensor] for suffix, tensor in told.items()})
        return None if inputs is None else inputs.rounded

    return rounds


def products_of(
    checkpoint: Checkpoint, device: torch.device
) -> Callable[[str, Mapping[str, str]], CompressedWeight] | None:
    """The weights of linears that round their inputs, where the reopened model's products are the weights' own."""
    config = checkpoint.quantization
    if config is None or config.get("quant_method") != MODELZIP or not rounds_inputs(config):
        return None
    decode = decoder(config)

    def weight(name: str, parts: Mapping[str, str]) -> CompressedWeight:
        read = checkpoint.read(parts.values(), device=device)
        return decode(name, {suffix: read[tensor] for suffix, tensor in parts.items()})

    return weight


def load_whole(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with all its weights, compressed ones made dense, in eval mode and without gradients of weights."""
    model = skeleton(checkpoint)
    model.config.use_cache = False
    names = NameMap(model, checkpoint)
    move_buffers(model, device)
    materialise(
        model, [""], checkpoint=checkpoint, names=names, device=device, dtype=dtype, decode=decode_of(checkpoint)
    )
    rounds = rounds_of(checkpoint, device)
    for name, module in model.named_modules():
        made = rounds(name, parts) if rounds is not None and (parts := names.parts(name)) else None
        if made is not None:
            module.register_forward_pre_hook(_rounding(straight_through(made)))
        if isinstance(module, nn.RNNBase):  # it computes with a list of its own, which knows the meta tensors
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    return model


def _rounding(rounds: Rounds) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounds(args[0]), *args[1:])

    return hook
