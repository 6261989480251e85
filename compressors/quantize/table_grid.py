"""Grids of any values: a table for the matrix or for each row, times a scale for each group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modelzip.kernels.obs_columns import Table
from modelzip.kernels.table_linear import Values
from modelzip.weights.codebook import Codebook

from .binary import binary_scales
from .grid import SPANS
from .kmeans import kmeans_tables
from .levels import abnormal_float, normal_float, small_float

SLAB_ELEMENTS = 1 << 20
"""Weights that are looked up at once."""

SEARCHED_ELEMENTS = 1 << 16
"""Weights whose scales are searched at once: so few that all that is made of them stays in the cache."""

BINS = 4096
"""Pieces of -1 to 1 for which the nearest entry is known beforehand."""


@dataclass(frozen=True)
class TableGrid:
    """The values that entries of one matrix [out, in] may have: table entry times scale plus offset.

    table: fp32 [1 or out, 2**bits], rising. scale: fp32 [bands, groups], one for each tile that these cut the matrix
    into, holding values of `dtype`; None for 1. offset: the same; None for 0.
    """

    table: Tensor
    scale: Tensor | None
    bits: int
    dtype: torch.dtype
    offset: Tensor | None = None

    def columns(self, index: Tensor, *, rows: int, in_features: int) -> Table:
        """The table, and scale and offset of the given columns, [len(index), rows]; for the column loop, of scales that
        each belong to one row."""
        if self.scale is None:
            return Table(self.table, None, None)
        group = index // (in_features // self.scale.shape[1])
        scale, offset = (None if one is None else one.T[group].contiguous() for one in (self.scale, self.offset))
        return Table(self.table, scale, offset)

    def nearest(self, weight: Tensor) -> Tensor:
        """Indices [out, in], int64, of the values nearest to weight [out, in]."""
        found, count = [], len(weight)
        values = Values(self.table, self.scale, self.offset)
        band = values.band(count)
        size = max(1, SLAB_ELEMENTS // weight.shape[1] // band) * band
        for begin in range(0, count, size):
            rows = slice(begin, min(begin + size, count))
            found.append(_nearest(weight[rows], values.rows(rows, count)))
        return torch.cat(found)

    def weight(self, codes: Tensor) -> Codebook:
        """The compressed weight with these indices [out, in]."""
        is_fixed = len(self.table) == 1 and self.scale is not None
        table = self.table if is_fixed else self.table.to(self.dtype)  # a matrix's own values are weights
        scale, offset = (None if one is None else one.to(self.dtype) for one in (self.scale, self.offset))
        return Codebook.from_indices(codes, table, scale, bits=self.bits, dtype=self.dtype, offset=offset)


def fit_table_grid(
    weight: Tensor,
    *,
    values: str,
    bits: int,
    group_size: int | str,
    clip: str,
    dtype: torch.dtype,
    importance: Tensor | None = None,
) -> TableGrid:
    """Fit tables or scales to weight [out, in].

    values: "nf", "af" or "fp4", tables that are the same everywhere, scaled by the largest magnitude of each group of
    `group_size` columns ("channel": of a row); clip "mse" also tries smaller and larger scales, and keeps the one of
    least squared error. "binary": -1 and 1, whose best scale is known. "kmeans": a table of the matrix's own values for
    each row ("channel") or the matrix ("tensor").
    importance: what an error in each column costs, [in]. dtype: of what is stored.
    """
    if values == "kmeans":
        tables = kmeans_tables(weight, count=1 << bits, per_row=group_size == "channel", importance=importance)
        return TableGrid(tables.to(dtype).float(), None, bits, dtype)
    size = weight.shape[1] if group_size == "channel" else int(group_size)
    if values == "binary":
        scale = stored_scales(by_group(weight, size, binary_scales, importance=importance), dtype)
        return TableGrid(torch.tensor([[-1.0, 1.0]], device=weight.device), scale, bits, dtype)
    table = table_of(values, bits=bits, group_size=size).to(weight.device)
    scale = _scales(weight, table, size, clip=clip, dtype=dtype, importance=importance)
    return TableGrid(table[None], scale, bits, dtype)


def by_group(
    weight: Tensor, size: int, best: Callable[[Tensor, Tensor | None], Tensor], *, importance: Tensor | None
) -> Tensor:
    """The best scales [out, groups] of weight [out, in], some rows at a time.

    best: from weights [out, groups, size] and what an error in each column costs, [1, groups, size], to their scales.
    importance: [in].
    """
    cost = None if importance is None else importance.reshape(1, -1, size)
    slabs = torch.split(weight, max(1, SEARCHED_ELEMENTS // weight.shape[1]))
    return torch.cat([best(slab.reshape(len(slab), -1, size), cost) for slab in slabs])


def table_of(values: str, *, bits: int, group_size: int) -> Tensor:
    """The table by its name, fp32 [2**bits]."""
    match values:
        case "nf":
            return normal_float(bits)
        case "af":
            return torch.tensor(abnormal_float(bits, group_size))
        case "fp4":
            return small_float()
    raise AssertionError(values)


def _scales(
    weight: Tensor, table: Tensor, size: int, *, clip: str, dtype: torch.dtype, importance: Tensor | None
) -> Tensor:
    """fp32 [out, groups], values of `dtype`, for tables between -1 and 1."""
    groups = weight.shape[1] // size
    cost = None if importance is None else importance.reshape(1, groups, size)
    bins = _bins(table)
    found = []
    for part in torch.split(weight, max(1, SEARCHED_ELEMENTS // weight.shape[1])):
        grouped = part.reshape(len(part), groups, size)
        largest = grouped.abs().amax(-1)
        best, least = stored_scales(largest, dtype), torch.full_like(largest, torch.inf)
        for span in SPANS if clip == "mse" else ():
            scale = stored_scales(largest * span, dtype)
            error = _errors(grouped, bins, scale, cost)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        found.append(best)
    return torch.cat(found)


def stored_scales(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales rounded to the dtype that they are stored in, 1 where nothing is left."""
    rounded = scale.to(dtype).float()
    return torch.where(rounded <= torch.finfo(torch.float32).tiny, 1.0, rounded)


def _bins(table: Tensor) -> Tensor:
    """The entry nearest to the middle of each of BINS pieces of -1 to 1: to look up takes a third of a search's time,
    and at a piece's edge either neighbour is off by as much."""
    middles = (2 * torch.arange(BINS, device=table.device) + 1) / BINS - 1
    return table[places(middles, table[None])]


def _errors(grouped: Tensor, bins: Tensor, scale: Tensor, cost: Tensor | None) -> Tensor:
    """Squared errors [out, groups] of grouped weights [out, groups, group_size]."""
    scaled = grouped / scale.unsqueeze(-1)
    index = torch.add(BINS / 2, scaled, alpha=BINS / 2).clamp_(0, BINS - 1).to(torch.int32)
    error = bins.index_select(0, index.reshape(-1)).reshape(scaled.shape).sub_(scaled).square_()
    if cost is not None:
        error *= cost
    return error.sum(-1) * scale.square()


def places(scaled: Tensor, table: Tensor) -> Tensor:
    """Indices of the nearest entries of rising tables, [1, entries] for all of scaled or [rows, entries] for each row;
    of two equally near the lower one."""
    middles = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
    return torch.searchsorted(middles[0] if len(table) == 1 else middles, scaled.contiguous())


def _nearest(weight: Tensor, values: Values) -> Tensor:
    table, scale, offset = values
    scaled = weight
    if scale is not None:
        bands, groups = scale.shape
        tiled = weight.reshape(bands, len(weight) // bands, groups, weight.shape[1] // groups)
        tiled = tiled if offset is None else tiled - offset[:, None, :, None]
        scaled = (tiled / scale[:, None, :, None]).reshape(weight.shape)
    return places(scaled, table)
