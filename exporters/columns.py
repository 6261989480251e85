"""What gptq and awq share: linears of blocks as integers [in, out] in int32 words, with scales [groups, out]."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.checkpoints.blocks import Linear, find_structure
from modelzip.checkpoints.errors import OutputError
from modelzip.weights.affine import Affine
from modelzip.weights.scales import GroupScales

from .folder import Entry
from .source import Source

WORD: Final = 32
"""Bits of a word, of which a row and a column of packed integers fill whole ones."""

FINE: Final = 2.0**-10
"""How much of itself a scale may lose by its type: more than rounding to 11 bits takes, less than underflow does."""


@dataclass(frozen=True)
class Layout:
    """What a format takes. groups: columns that share a scale, beside one scale to a row, which is always taken."""

    name: str
    bits: tuple[int, ...]
    groups: tuple[int, ...]


def block_linears(source: Source) -> list[Linear]:
    """All linears of the blocks. Raises CheckpointError for a model without any."""
    structure = find_structure(source.model, source.checkpoint, names=source.names)
    return [linear for block in structure.blocks for linear in block.linears]


def packed_linears(source: Source) -> dict[Linear, Affine]:
    """The linears of the blocks that are stored as integers, with their weights on the meta device."""
    found = {linear: source.stored(linear.name) for linear in block_linears(source)}
    return {linear: weight for linear, weight in found.items() if isinstance(weight, Affine)}


def misfit(source: Source, layout: Layout) -> str | None:
    """Why the layout can't hold the model, as a clause that names the first culprit, or None."""
    found = {name: weight for name in source.matrices() if (weight := source.stored(name)) is not None}
    if not found:
        return f"it is dense, and {layout.name} holds integers: quantize it first"
    linears = {linear.name: linear for linear in block_linears(source)}
    for name, weight in found.items():
        if name not in linears:
            return f"{name} is compressed, and {layout.name} holds linears in blocks, each with a weight of its own"
        if not isinstance(weight, Affine):
            return f"{name} is stored as {weight.kind}, and {layout.name} holds integers with scales"
        if (clause := _misfit(weight, linears[name], layout)) is not None:
            return f"{name} {clause}"
    packed = packed_linears(source)
    if (clause := _differing(packed, layout)) is not None:
        return clause
    if (touched := _initialised(source.model, packed)) is not None:
        return f"{touched} can't be packed: transformers gives it random weights as it opens a model of this type"
    return None


def group_size(weights: Iterable[Affine]) -> int:
    """Columns that share a scale in these weights of one model: the fewest of all; -1 for one scale to a row."""
    return min((weight.group_size for weight in weights if weight.strategy == "group"), default=-1)


def fitting_scales(source: Source, linear: Linear, weight: Affine, size: int) -> tuple[GroupScales, bool]:
    """Scales float16 [out, groups] and zero points of a linear, read, for groups of `size` columns (-1: all); and
    whether one lost more than float16's own rounding, since it is below its normal range.

    Raises OutputError for a scale that float16 can't hold.
    """
    parts = source.parts(linear.name)
    wanted = {suffix: name for suffix, name in parts.items() if suffix in ("weight_scale", "weight_zero_point")}
    tensors = source.checkpoint.read(wanted.values())
    read = GroupScales.from_tensors(
        {suffix: tensors[name] for suffix, name in wanted.items()}, bits=weight.bits, shape=weight.shape
    )
    old, new = read.scale.float(), read.scale.to(torch.float16)
    if not bool(new.isfinite().all()) or bool(((new == 0) & (old != 0)).any()):
        raise OutputError(
            f"{linear.name} has scales from {float(old.abs().min()):.3g} to {float(old.abs().max()):.3g}, of which "
            "float16 can't hold all: export it to compressed-tensors instead."
        )
    coarse = bool(((new.float() - old).abs() > FINE * old.abs()).any())
    rows, repeats = weight.shape[0], 1 if size < 0 else weight.group_size // size

    def spread(values: Tensor) -> Tensor:
        return values.expand(rows, -1).repeat_interleave(repeats, dim=1)

    zero_point = None if read.zero_point is None else spread(read.zero_point)
    return GroupScales(spread(new), zero_point, weight.bits, weight.shape), coarse


def coarse_note(count: int) -> tuple[str, ...]:
    """What is to be said of linears with scales below the normal range of their type."""
    many = "1 matrix" if count == 1 else f"{count} matrices"
    return (f"scales of {many} are below float16's normal range and were rounded",) if count else ()


def unsigned_zero_points(scales: GroupScales) -> Tensor:
    """Zero points [groups, out] of codes in 0 ... 2**bits - 1, uint8: the middle of these where the grid is
    symmetric."""
    middle = 1 << (scales.bits - 1)
    if scales.zero_point is None:
        return torch.full(scales.scale.T.shape, middle, dtype=torch.uint8)
    return (scales.zero_point.T.to(torch.int16) + middle).to(torch.uint8)


def entries(
    source: Source, linears: Mapping[Linear, Affine], parts: Callable[[Linear, Affine], Mapping[str, Tensor]]
) -> Iterator[Entry]:
    """An entry for each linear. parts: from the linear and its weight, read, to tensors by suffix (`qweight`, ...)."""
    for linear, weight in linears.items():
        stem = linear.tensor.removesuffix("weight")

        def make(linear: Linear = linear, stem: str = stem) -> dict[str, Tensor]:
            read = source.weight(linear.name)
            assert isinstance(read, Affine)
            return {f"{stem}{suffix}": tensor.contiguous() for suffix, tensor in parts(linear, read).items()}

        yield Entry(4 * weight.nbytes, tuple(source.parts(linear.name).values()), make)


def _misfit(weight: Affine, linear: Linear, layout: Layout) -> str | None:
    """What the layout has against a weight, to be said after its name."""
    if linear.transposed:
        return f"is a Conv1D, and {layout.name} holds plain linears"
    if weight.bits not in layout.bits:
        return f"has {weight.bits} bits, and {layout.name} takes {_either(layout.bits)}"
    if weight.strategy == "group" and weight.group_size not in layout.groups:
        return f"has {weight.group_size} columns to a scale, and {layout.name} takes {_either(layout.groups)}, or all"
    if any(size % _multiple(weight.bits) for size in weight.shape):
        return f"is {list(weight.shape)}, and {layout.name} takes multiples of {_multiple(weight.bits)}"
    return None


def _differing(linears: Mapping[Linear, Affine], layout: Layout) -> str | None:
    """A clause about the first linear that isn't on the grid of the others: config.json names one for all."""
    first, wanted = next(iter(linears.items()))
    size = group_size(linears.values())
    for linear, weight in linears.items():
        if weight.bits != wanted.bits:
            return f"{linear.name} has {weight.bits} bits and {first.name} {wanted.bits}: {layout.name} has one width"
        if size > 0 and weight.group_size % size:
            return f"{linear.name} has {weight.group_size} columns to a scale, of which {size} don't make whole groups"
    return None


def _initialised(model: Any, linears: Mapping[Linear, Affine]) -> str | None:
    """The first of these linears whose weight isn't initialised by itself, but by the module that holds it."""
    for linear in linears:
        weight = model.get_submodule(linear.name).get_parameter("weight")
        before = weight._version  # the count of writes
        model._init_weights(model.get_submodule(linear.name.rpartition(".")[0]))  # on the meta device
        if weight._version != before:
            return linear.name
    return None


def _multiple(bits: int) -> int:
    """How many codes fill whole words."""
    return WORD // math.gcd(WORD, bits)


def _either(words: Iterable[int]) -> str:
    *others, last = map(str, words)
    return f"{', '.join(others)} or {last}" if others else last
