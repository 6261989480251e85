"""A compressed checkpoint as a plain one: every matrix as it computes, for runtimes that don't know the layout.

The output takes as many bytes as a dense model does; what was lost in compression stays lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modelzip.checkpoints.errors import CheckpointError, OutputError
from modelzip.checkpoints.index import DTYPES, Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.weights.experts import UNFUSED
from modelzip.weights.layouts import MODELZIP, decoder
from modelzip.weights.plugin import located
from modelzip.weights.value import dtype_name
from modelzip.weights.vector_codebook import VectorCodebook

from .experts import fused_entries
from .folder import Entry, write_folder
from .places import Place, compressed_places, shared_places
from .request import Request, Written
from .source import Source

CAST: Final = ("F64", "F32", "F16", "BF16")
"""Types of tensors that `dtype` changes."""


def write(request: Request) -> Written:
    """Write the checkpoint with every compressed matrix dense.

    Without a dtype, the matrices take the type that config.json names. Raises CheckpointError if there is nothing to
    do, OutputError for a number that float16 can't hold, and what the writer raises.
    """
    checkpoint = request.checkpoint
    entries = list(dense_entries(request.source, request.dtype))
    if not entries and not checkpoint.source.lower().endswith(".gguf"):
        raise CheckpointError(_nothing(request))
    return Written(write_folder(request, entries, format="dense", config=plain_config(request)), _notes(request))


def misfit(source: Source, scheme: str) -> str | None:
    """Why no plain checkpoint can hold this one, or None."""
    checkpoint = source.checkpoint
    if checkpoint.quantization is None:
        return None
    return _misfit(checkpoint.quantization, skeleton(_plain(checkpoint)))


def plain_config(request: Request) -> dict[str, Any]:
    """config.json of a model without compressed matrices, in the type that was asked for."""
    config = _plain(request.checkpoint).config
    if request.dtype is None:
        return config
    return {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype_name(request.dtype)}


def cast_entries(checkpoint: Checkpoint, dtype: torch.dtype | None, claimed: set[str]) -> Iterator[Entry]:
    """The floating tensors that aren't claimed, in another type."""
    for name, info in checkpoint.tensors.items():
        if dtype is not None and name not in claimed and info.dtype in CAST and DTYPES[info.dtype] != dtype:
            nbytes = math.prod(info.shape) * dtype.itemsize
            yield Entry(nbytes, (name,), lambda name=name: {name: _cast(checkpoint, name, dtype)})  # type: ignore[misc]


def cast_note(request: Request) -> tuple[str, ...]:
    """What is to be said of a change of type: every type but float32 may round."""
    if request.dtype in (None, torch.float32):
        return ()
    return (f"floating tensors were rounded to {dtype_name(request.dtype)}",)


def _notes(request: Request) -> tuple[str, ...]:
    """What is to be said of rounding: sums of entries of codebooks are values of fp32."""
    notes = cast_note(request)
    weights = (request.source.stored(name) for name in request.source.matrices())
    dtype = request.dtype or request.checkpoint.dtype
    if not notes and dtype != torch.float32 and any(isinstance(one, VectorCodebook) for one in weights):
        return (f"values of codebooks of vectors were rounded to {dtype_name(dtype)}",)
    return notes


def _plain(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, config={k: v for k, v in checkpoint.config.items() if k != "quantization_config"})


def _nothing(request: Request) -> str:
    source = request.checkpoint.source
    if request.dtype is not None:
        return f"{source} is dense already, and its tensors are {dtype_name(request.dtype)}: there is nothing to do."
    return f"{source} is dense already: there is nothing to do but to change its type with --dtype."


def dense_entries(source: Source, dtype: torch.dtype | None) -> Iterator[Entry]:
    """All tensors of the output that aren't the checkpoint's own."""
    checkpoint, claimed = source.checkpoint, set[str]()
    for entry in _decoded(source, dtype) if checkpoint.quantization is not None else ():
        left = tuple(name for name in entry.replaces if name not in claimed)
        claimed.update(left)
        yield replace(entry, replaces=left)
    yield from cast_entries(checkpoint, dtype, claimed)


def _decoded(source: Source, dtype: torch.dtype | None) -> Iterator[Entry]:
    """Every matrix that is stored compressed, experts put together, and every tensor stored under another's name."""
    checkpoint = source.checkpoint
    config = checkpoint.quantization
    assert config is not None
    decode = decoder(config)
    model = skeleton(_plain(checkpoint))  # the model that will be opened: all sizes are config.json's
    wanted = dtype or own_dtype(checkpoint)
    yield from fused_entries(source, model, wanted, finite)
    apart = tuple(f"{path}." for path in config.get(UNFUSED, ()))
    for place in compressed_places(checkpoint, model):
        if place.module.startswith(apart):
            continue
        path = located(model, place.module)
        layer = None if path is None else model.get_submodule(path)

        def make(place: Place = place, layer: nn.Module | None = layer) -> dict[str, Tensor]:
            tensors = checkpoint.read(place.parts.values())
            weight = decode(place.module, {suffix: tensors[source] for suffix, source in place.parts.items()})
            dense = weight.dense(wanted).T if isinstance(layer, Conv1D) else weight.dense(wanted)
            return {place.name: finite(dense.contiguous(), place.name)}

        count = 0 if layer is None else layer.get_parameter("weight").numel()
        yield Entry(count * wanted.itemsize, tuple(place.parts.values()), make)
    for name, stored in shared_places(checkpoint):
        info = checkpoint.tensors[stored]
        kept = dtype if dtype is not None and info.dtype in CAST else DTYPES[info.dtype]
        nbytes = math.prod(info.shape) * kept.itemsize

        def copy(name: str = name, stored: str = stored, kept: torch.dtype = kept) -> dict[str, Tensor]:
            return {name: _cast(checkpoint, stored, kept)}

        yield Entry(nbytes, (), copy)


def _misfit(config: Mapping[str, Any], model: nn.Module) -> str | None:
    """A clause about the first module of modelzip's own layout that has another size than config.json's."""
    for module, meta in config["modules"].items() if config.get("quant_method") == MODELZIP else ():
        path = located(model, module)
        layer = None if path is None else model.get_submodule(path)
        shape = None if layer is None else list(layer.get_parameter("weight").shape)
        if shape is not None and (shape[::-1] if isinstance(layer, Conv1D) else shape) != list(meta["shape"]):
            told = "which isn't what config.json asks for, so no plain checkpoint can hold it"
            return f"{module} is {meta['shape']}, {told}"
    return None


def own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type that config.json names, or else that of most of the checkpoint."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    found = getattr(torch, str(named), None)
    return found if isinstance(found, torch.dtype) else checkpoint.dtype


def _cast(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    return finite(checkpoint.read([name], dtype=dtype)[name], name)


def finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor itself. Raises OutputError if a number is too large for float16."""
    if tensor.dtype == torch.float16 and not bool(tensor.isfinite().all()):
        raise OutputError(f"{name} has numbers beyond the range of float16: choose --dtype bfloat16 or float32.")
    return tensor
