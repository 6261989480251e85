"""Where a checkpoint keeps what its compressed modules, and those that share with others, are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.weights.kinds import empty
from modelzip.weights.layouts import MODELZIP


@dataclass(frozen=True)
class Place:
    """A compressed module. name: what its dense weight is called. parts: tensors of the checkpoint, by suffix."""

    module: str
    name: str
    parts: Mapping[str, str]


def compressed_places(checkpoint: Checkpoint, model: nn.Module) -> Iterator[Place]:
    """Every compressed module of the checkpoint. Raises CheckpointError if a tensor of one is missing."""
    config = checkpoint.quantization or {}
    if config.get("quant_method") != MODELZIP:
        names = NameMap(model, checkpoint)
        for module, _ in model.named_modules():
            if parts := names.parts(module):
                suffix, tensor = next(iter(parts.items()))
                yield Place(module, tensor.removesuffix(suffix) + "weight", parts)
        return
    shared: Mapping[str, str] = config.get("shared") or {}
    for module, meta in config["modules"].items():
        parts = {}
        for suffix in empty(meta).tensors():
            full = shared.get(f"{module}.{suffix}", f"{module}.{suffix}")
            parts[suffix] = _stored(checkpoint, full)
        yield Place(module, _named_like(f"{module}.weight", full, parts[suffix]), parts)


def shared_places(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Plain tensors that aren't stored: what each is called, and the tensor of the checkpoint that it is."""
    config: Mapping[str, Any] = checkpoint.quantization or {}
    modules = config.get("modules") or {}
    for name, owner in (config.get("shared") or {}).items():
        path, _, leaf = name.rpartition(".")
        if path not in modules or leaf == "bias":
            stored = _stored(checkpoint, owner)
            yield _named_like(name, owner, stored), stored


def _stored(checkpoint: Checkpoint, name: str) -> str:
    """The tensor of a parameter, which may have or lack the prefix of the base model."""
    if name in checkpoint.tensors:
        return name
    found = [one for one in checkpoint.tensors if one.endswith(f".{name}") or name.endswith(f".{one}")]
    if len(found) != 1:
        raise CheckpointError(f"{checkpoint.source} lacks {name}, which its config.json says it has; get it again.")
    return found[0]


def _named_like(name: str, parameter: str, stored: str) -> str:
    """The name that goes with `name` as `stored` goes with `parameter`: a prefix more or less."""
    if stored.endswith(parameter):
        return stored.removesuffix(parameter) + name
    return name.removeprefix(parameter.removesuffix(stored))
