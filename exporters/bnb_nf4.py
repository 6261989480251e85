"""bitsandbytes' 4-bit NormalFloat (Dettmers et al. 2023, QLoRA): the linears of the blocks rounded by that library.

A weight [out, in] becomes `weight` uint8 [n, 1], two codes to a byte, and beside it `weight.absmax` (a fp32 scale to 64
weights), `weight.quant_map` (the 16 values of a code) and `weight.quant_state.bitsandbytes__nf4` (shape, type and the
like, as JSON in bytes). Scales aren't rounded themselves ("double quantization"): a weight takes 4.5 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modelzip.checkpoints.blocks import Linear
from modelzip.weights.value import dtype_name

from . import dense
from .columns import block_linears
from .folder import Entry, write_folder
from .request import Request, Written
from .skipped import converted
from .source import Source

BLOCK: Final = 64
"""Weights to a scale: what transformers makes a model with."""

ROWS: Final = 32
"""Outputs that bitsandbytes' kernel for CPUs with bfloat16 takes at a time: it fails on others."""


def misfit(source: Source, scheme: str) -> str | None:
    """Why bitsandbytes can't hold the model, or None."""
    if shared := next((linear for linear in block_linears(source) if linear.sharers), None):
        return f"{shared.sharers[0]} has its weight from {shared.name}, and bitsandbytes stores each by itself"
    linears = _rounded_linears(source)
    if not linears:
        return "transformers leaves all its linears dense"
    if odd := next((one for one in linears if one.shape[0] % ROWS or one.shape[1] % BLOCK), None):
        told = f"multiples of {ROWS} outputs and {BLOCK} inputs, as its kernel for CPUs does"
        return f"{odd.name} is {list(odd.shape)}, and bitsandbytes takes {told}"
    return dense.misfit(source, scheme)


def write(request: Request) -> Written:
    """Write the checkpoint with the linears of its blocks rounded, one in memory at a time, and all else dense.

    Rounding is done on the CPU, from the weights in the type that the output has. Raises OutputError for a number that
    float16 can't hold.
    """
    checkpoint = request.checkpoint
    source = request.source
    dtype = request.dtype or dense.own_dtype(checkpoint)
    linears = _rounded_linears(source)
    entries = list(_entries(source, linears, dtype))
    claimed = {name for entry in entries for name in entry.replaces}
    entries += [one for one in dense.dense_entries(request.source, request.dtype) if claimed.isdisjoint(one.replaces)]
    config = {
        **{key: value for key, value in dense.plain_config(request).items() if key != "torch_dtype"},
        "dtype": dtype_name(dtype),
        "quantization_config": _config(source, dtype),
    }
    note = f"{len(linears)} matrices were rounded to 4-bit NormalFloat, {BLOCK} weights to a scale"
    return Written(write_folder(request, entries, format="bnb-nf4", config=config), (note, *dense.cast_note(request)))


def _entries(source: Source, linears: list[Linear], dtype: torch.dtype) -> Iterator[Entry]:
    for linear in linears:

        def make(linear: Linear = linear) -> dict[str, Tensor]:
            from bitsandbytes.functional import quantize_4bit

            weight = dense.finite(source.dense(linear.name, dtype), linear.tensor)
            codes, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
            parts = state.as_dict(packed=True)
            return {linear.tensor: codes, **{f"{linear.tensor}.{suffix}": part for suffix, part in parts.items()}}

        replaces = tuple(source.parts(linear.name).values()) or (linear.tensor,)
        yield Entry(linear.shape[0] * linear.shape[1] * dtype.itemsize, replaces, make)


def _rounded_linears(source: Source) -> list[Linear]:
    """The linears of the blocks without those that transformers opens dense, as the model's class says."""
    is_converted = converted(source.model, _outside(source), defaults=False)
    return [linear for linear in block_linears(source) if is_converted(linear.name)]


def _outside(source: Source) -> list[str]:
    """Linears that aren't rounded: all but those of the blocks."""
    inside = {linear.name for linear in block_linears(source)}
    modules = source.model.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear | Conv1D) and name not in inside]


def _config(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype_name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": _outside(source),
    }
