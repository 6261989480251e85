"""compressed-tensors: packed integers as they are, or every linear of the blocks as int8 or fp8 with 8-bit activations.

Which configs vLLM takes is fixed by its choice of a scheme from the arguments of weights and activations; all that is
written here are among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from modelzip.checkpoints.blocks import Linear, find_structure
from modelzip.checkpoints.cached import DENSE_WEIGHTS, scales_of, scheme_of, unopened_by_compressed_tensors
from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.compressors.quantize.grid import fit_grid
from modelzip.recipes.export_formats import AUTO
from modelzip.weights.affine import Affine
from modelzip.weights.float import Float
from modelzip.weights.input_schemes import eight_bit_config
from modelzip.weights.int8 import Int8
from modelzip.weights.kv_cache import SCHEME
from modelzip.weights.layouts import (
    COMPRESSED_TENSORS,
    MODELZIP,
    opened_dense,
    portable,
    quantization_config,
    stored_tensors,
)
from modelzip.weights.small_floats import E4M3
from modelzip.weights.value import CompressedWeight

from .dense import cast_entries, cast_note, plain_config
from .folder import Entry, write_folder
from .request import Request, Written
from .source import Source

FP8_LARGEST: Final = 448.0
"""The largest number of float8 e4m3."""

LAYOUTS: Final = MappingProxyType({"W8A8": ("int-quantized", "int"), "FP8": ("float-quantized", "float")})
"""Of each scheme: compressed-tensors' words for the layout and for the type."""


def write(request: Request) -> Written:
    """Write the checkpoint. `auto`: its packed integers under compressed-tensors' config; `W8A8`, `FP8`: every linear
    of the blocks rounded by channel, activations by token at run time.

    Raises CheckpointError if there is nothing to do, and what the writer raises.
    """
    source = request.source
    return _as_it_is(request, source) if request.scheme == AUTO else _eight_bits(request, source)


def misfit(source: Source, scheme: str) -> str | None:
    """Why compressed-tensors can't hold the model so, or None."""
    structure = find_structure(source.model, source.checkpoint, names=source.names)
    linears = {linear.name: linear for block in structure.blocks for linear in block.linears}
    if shared := next((name for block in structure.blocks for name in block.sharers), None):
        return f"{shared} has its weight from another linear, and compressed-tensors stores each by itself"
    if transposed := next((linear.name for linear in linears.values() if linear.transposed), None):
        return f"{transposed} is stored [in, out] (a Conv1D), which compressed-tensors doesn't know"
    found = {name: weight.meta() for name in source.matrices() if (weight := source.stored(name)) is not None}
    if outside := next((name for name in found if not isinstance(source.model.get_submodule(name), nn.Linear)), None):
        return f"{outside} is compressed and no linear, and compressed-tensors holds linears alone"
    if clause := _cache_misfit(source, made_dense=scheme == AUTO and opened_dense(found.values())):
        return clause
    if scheme != AUTO:
        return None
    if not found:
        return f"it is dense: quantize it first, or round it here with --scheme {' or '.join(LAYOUTS)}"
    if not portable(found.values(), transposed=False):
        name, meta = next((n, m) for n, m in found.items() if not portable([m], transposed=False) or len(found) > 1)
        return (
            f"{name} ({_said(meta)}) isn't what compressed-tensors holds: integers of 2, 4 or 8 bits, fp8 e4m3 with a "
            "scale a row or a matrix, mxfp4 or nvfp4, all alike"
        )
    return None


def _as_it_is(request: Request, source: Source) -> Written:
    checkpoint = request.checkpoint
    config = checkpoint.quantization or {}
    entries = list(cast_entries(checkpoint, request.dtype, _parts_of_all(source)))
    if config.get("quant_method") == MODELZIP:
        entries += _renamed(source)
    if config.get("quant_method") == COMPRESSED_TENSORS and not entries:
        raise CheckpointError(f"{checkpoint.source} is {COMPRESSED_TENSORS} already, so there is nothing to do.")
    metas = {name: weight.meta() for name in source.matrices() if (weight := source.stored(name)) is not None}
    linears = [name for name, module in source.model.named_modules() if isinstance(module, nn.Linear)]
    written = quantization_config(metas, layout=COMPRESSED_TENSORS, linears=linears)
    whole = {**plain_config(request), "quantization_config": {**written, **_cache_words(checkpoint)}}
    return Written(write_folder(request, entries, format=COMPRESSED_TENSORS, config=whole), cast_note(request))


def _renamed(source: Source) -> Iterator[Entry]:
    """Weights of modelzip's own layout that compressed-tensors calls otherwise, as it does."""
    for name in source.matrices():
        weight, parts = source.stored(name), source.parts(name)
        if weight is None or isinstance(weight, Affine):
            continue
        suffix, tensor = next(iter(parts.items()))

        def make(name: str = name, stem: str = tensor.removesuffix(suffix)) -> dict[str, Tensor]:
            read = source.weight(name)
            assert read is not None
            return {stem + suffix: part for suffix, part in stored_tensors(read, COMPRESSED_TENSORS).items()}

        yield Entry(2 * weight.nbytes, tuple(parts.values()), make)


def _eight_bits(request: Request, source: Source) -> Written:
    checkpoint, scheme = request.checkpoint, request.scheme
    structure = find_structure(source.model, checkpoint, names=source.names)
    linears = [linear for block in structure.blocks for linear in block.linears]
    dtype = request.dtype or checkpoint.dtype
    entries, claimed, rounded, fixed = [], set[str](), 0, 0
    for linear in linears:
        replaces = tuple(source.parts(linear.name).values()) or (linear.tensor,)
        claimed.update(replaces)
        stored = source.stored(linear.name)
        rounded += stored is None or not _fits(stored, scheme)
        fixed += getattr(getattr(stored, "inputs", None), "scale", None) is not None

        def make(linear: Linear = linear) -> dict[str, Tensor]:
            values, scale = _by_channel(source, linear.name, scheme=scheme, dtype=dtype)
            stem = linear.tensor.removesuffix("weight")
            return {f"{stem}weight": values, f"{stem}weight_scale": scale}

        entries.append(Entry(5 * linear.shape[0] * linear.shape[1], replaces, make))
    entries += cast_entries(checkpoint, request.dtype, claimed | _parts_of_all(source))
    config = {**plain_config(request), "quantization_config": _config(source, [one.name for one in linears], scheme)}
    notes = ["activations are rounded to 8 bits by token at run time"]
    if fixed:
        notes.append(f"fixed scales of the inputs of {fixed} matrices are left out, which --scheme {AUTO} keeps")
    if rounded:
        notes.append(f"{rounded} matrices were rounded anew to {scheme}, a scale to each row")
    return Written(
        write_folder(request, entries, format=COMPRESSED_TENSORS, config=config), (*notes, *cast_note(request))
    )


def _by_channel(source: Source, module: str, *, scheme: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values [out, in] of 8 bits and their scales [out, 1] in `dtype`; those of the source if they are such already."""
    weight = source.weight(module)
    if weight is not None and _fits(weight, scheme):
        if isinstance(weight, Int8):
            return weight.codes, weight.scale
        if isinstance(weight, Affine):
            return weight.codes(), weight.scale
        assert isinstance(weight, Float)
        return weight.codes().view(torch.float8_e4m3fn), weight.scale
    dense = source.dense(module)
    if scheme == "W8A8":
        grid = fit_grid(dense, bits=8, group_size=dense.shape[1], symmetric=True, clip="none", dtype=dtype)
        return grid.nearest(dense).to(torch.int8), grid.scale.to(dtype)
    scale = (dense.abs().amax(1, keepdim=True) / FP8_LARGEST).clamp(min=torch.finfo(torch.float16).tiny).to(dtype)
    values = (dense / scale.float()).clamp(-FP8_LARGEST, FP8_LARGEST)
    return values.to(torch.float8_e4m3fn), scale


def _fits(weight: CompressedWeight, scheme: str) -> bool:
    """Whether a weight has 8 bits of the scheme's kind already, and a scale a row."""
    if isinstance(weight, Float):
        return scheme == "FP8" and weight.element == E4M3 and weight.strategy == "channel"
    if isinstance(weight, Int8):
        return scheme == "W8A8"
    if not isinstance(weight, Affine) or scheme != "W8A8":
        return False
    return weight.bits == 8 and weight.zero_point is None and weight.strategy == "channel"


def _config(source: Source, names: list[str], scheme: str) -> dict[str, Any]:
    layout, kind = LAYOUTS[scheme]
    linears = [name for name, module in source.model.named_modules() if isinstance(module, nn.Linear)]
    return {**eight_bit_config(names, linears, layout=layout, kind=kind), **_cache_words(source.checkpoint)}


def _cache_words(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is said of rounding keys and values; their scales are copied."""
    scheme = scheme_of(checkpoint)
    return {} if scheme is None else {SCHEME: scheme.words}


def _cache_misfit(source: Source, *, made_dense: bool) -> str | None:
    """Why compressed-tensors can't say that keys and values are rounded, where they are; None if it can."""
    scheme = scheme_of(source.checkpoint)
    if scheme is None:
        return None
    if made_dense:
        return DENSE_WEIGHTS
    by_head = scheme.strategy != "tensor"
    return unopened_by_compressed_tensors(source.model, scales_of(source.checkpoint), by_head=by_head) or None


def _parts_of_all(source: Source) -> set[str]:
    """Tensors that compressed weights are made of, whose types are part of their values."""
    return {name for module in source.matrices() for name in source.parts(module).values()}


def _said(meta: Mapping[str, Any]) -> str:
    if meta["kind"] == Float.kind:
        return f"{meta['element']}, {meta['strategy']}"
    return f"{meta['bits']} bits, {meta['strategy']}" if meta["kind"] == Affine.kind else str(meta["kind"])
