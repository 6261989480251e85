"""A narrow input embedding and a projection: the rank, the factors, and the checkpoint that holds them.

An output head that is tied to the embedding shares the factors; one of its own is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from modelzip.checkpoints.errors import CheckpointError, ProblemsError
from modelzip.checkpoints.headers import TensorInfo
from modelzip.checkpoints.index import DTYPES, Checkpoint
from modelzip.checkpoints.rewrite import Rewrite, expected, opens
from modelzip.compressors.factorize.budget import SMALLEST, already_small, ratio_for_budget
from modelzip.compressors.factorize.embedding import embedding_factors, smoothed
from modelzip.compressors.factorize.methods import low_rank
from modelzip.compressors.factorize.settings import Embedding
from modelzip.compressors.factorize.spectrum import chosen_rank
from modelzip.recipes.schema import Recipe
from modelzip.weights.layouts import MODELZIP, quantization_config, shared_parts
from modelzip.weights.low_rank import LowRank

from .context import Context
from .headers import info_of
from .smaller import StructuralMethod, headers_of
from .tables import Table, input_table, refusal
from .text import Windows


@dataclass(frozen=True)
class Given:
    """A tensor that has been made already; on the meta device as long as it is only planned."""

    tensor: Tensor
    sources: tuple[str, ...]

    def like(self, source: Checkpoint) -> TensorInfo:
        return info_of("", self.tensor)

    def make(self, source: Checkpoint) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Narrowed:
    """The factors of a table. error: ‖D(E − Ê)‖ as a share of ‖DE‖, D² what each token counts."""

    table: Table
    weight: LowRank
    error: float = 0.0


def plan_embedding(settings: Embedding, checkpoint: Checkpoint) -> Narrowed:
    """The factors on the meta device, at their largest if the rank depends on values. Raises ProblemsError with what
    stands in the way, CheckpointError for unknown models."""
    quantization = checkpoint.quantization
    if quantization is not None and quantization.get("quant_method") != MODELZIP:
        raise ProblemsError([f"{checkpoint.source} is quantized already: factorize the embedding before quantizing"])
    headers = headers_of(checkpoint)
    table = input_table(headers.model, headers.names)
    if headers.names.parts(table.module):
        raise ProblemsError([f"{table.module} is compressed already: give the original model"])
    dtype = DTYPES[checkpoint.tensors[table.tensor].dtype]
    rank = min(chosen_rank(_sized(settings, table, checkpoint), table.shape), *table.shape)
    rows, columns = table.shape
    weight = low_rank(
        (torch.empty(rows, rank, dtype=dtype, device="meta"), torch.empty(rank, columns, dtype=dtype, device="meta")),
        dtype,
    )
    dense = checkpoint.tensors[table.tensor].nbytes
    if weight.nbytes >= dense:
        raise ProblemsError(
            [
                f"{table.module}: factors of rank {rank} would take {weight.nbytes:,} bytes, and it takes {dense:,} "
                "dense: take a lower rank"
            ]
        )
    if problem := refusal(table, headers.model, weight):
        raise CheckpointError(problem)
    return Narrowed(table, weight)


def _sized(settings: Embedding, table: Table, checkpoint: Checkpoint) -> Embedding:
    """The settings with a ratio in place of a target size for the whole model. Raises ProblemsError."""
    target = settings.target_bytes
    if target is None:
        return settings
    if problem := already_small(checkpoint.nbytes, target):
        raise ProblemsError([problem])
    info, (rows, columns) = checkpoint.tensors[table.tensor], table.shape
    item = info.nbytes // (rows * columns)

    def bytes_at(ratio: float) -> int:
        rank = min(chosen_rank(settings.at_ratio(ratio), table.shape), *table.shape)
        return checkpoint.nbytes - info.nbytes + item * rank * (rows + columns)

    ratio = ratio_for_budget(bytes_at, target)
    if ratio is None:
        raise ProblemsError(
            [
                f"target_size {target / 1e6:,.1f} MB can't be reached: with an embedding of rank 1 the model still "
                f"weighs {bytes_at(SMALLEST) / 1e6:,.1f} MB"
            ]
        )
    return settings.at_ratio(ratio)


def factor_embedding(
    settings: Embedding, checkpoint: Checkpoint, windows: Windows | None, context: Context
) -> Narrowed:
    """The factors themselves, tokens weighted by how often the windows have them. Raises ProblemsError if the energy
    that is asked for needs factors that cost more than the table."""
    planned = plan_embedding(settings, checkpoint)
    table = planned.table
    stored = checkpoint.read([table.tensor], device=context.device)[table.tensor]
    weights = None
    if windows is not None and settings.weighting == "frequency":
        counts = torch.bincount(windows.tokens.flatten().to(torch.int64), minlength=len(stored))
        weights = smoothed(counts[: len(stored)]).to(stored.device)
    factors = embedding_factors(stored, _sized(settings, table, checkpoint), weights)
    made = low_rank((factors[0].cpu(), factors[1].cpu()), stored.dtype)
    if made.nbytes >= stored.nbytes:
        raise ProblemsError(
            [
                f"{table.module}: energy {settings.energy} needs rank {made.rank}, at which the factors cost more than "
                "the embedding: ask for less, or give a rank"
            ]
        )
    return Narrowed(table, made, _error(stored.cpu(), made, None if weights is None else weights.cpu()))


def _error(stored: Tensor, made: LowRank, weights: Tensor | None, rows: int = 8192) -> float:
    """The error that `Narrowed` tells, some rows at a time."""
    lost = kept = 0.0
    for start in range(0, len(stored), rows):
        index = torch.arange(start, min(start + rows, len(stored)))
        exact = stored[index].double()
        by_row = torch.ones(len(index), dtype=torch.float64) if weights is None else weights[index]
        lost += float((by_row[:, None] * (made.rows(index).double() - exact).square()).sum())
        kept += float((by_row[:, None] * exact.square()).sum())
    return (lost / kept) ** 0.5 if kept > 0 else 0.0


def build_embedding(settings: Embedding, checkpoint: Checkpoint, narrowed: Narrowed) -> Rewrite:
    """The factors in the table's place. Raises CheckpointError if no such model opens."""
    table, meta = narrowed.table, narrowed.weight.meta()
    before = checkpoint.quantization or quantization_config({}, layout=MODELZIP, linears=[])
    shared = dict(before.get("shared", {}))
    for other in table.others:
        shared.pop(f"{other}.weight", None)
        shared |= shared_parts(other, table.module, meta)
    modules = {**before["modules"], **dict.fromkeys((table.module, *table.others), meta)}
    stem = table.tensor.removesuffix("weight")
    pieces = {}
    for number, (suffix, tensor) in enumerate(narrowed.weight.tensors().items()):
        pieces[stem + suffix] = Given(tensor, (table.tensor,) if number == 0 else ())
    record = {
        "method": settings.method,
        "rank": narrowed.weight.rank,
        "weight": meta,
        "weight_error": narrowed.error,
        "shared_with": list(table.others),
        "note": "",
    }
    rewrite = Rewrite(
        config={**checkpoint.config, "quantization_config": {**before, "modules": modules, "shared": shared}},
        parts={table.module: pieces},
        records={table.module: record},
    )
    if problem := opens(expected(rewrite, checkpoint)):
        raise CheckpointError(problem)
    return rewrite


def _memory(settings: Embedding, checkpoint: Checkpoint, recipe: Recipe) -> int:
    rows, columns = plan_embedding(settings, checkpoint).table.shape
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    return largest + 4 * 4 * rows * columns + 4 * 8 * columns**2


def _notes(settings: Embedding, rewrite: Rewrite) -> tuple[str, ...]:
    ((name, record),) = rewrite.records.items()
    at_most = " at most" if settings.energy is not None else ""
    rows, columns = record["weight"]["shape"]
    notes = [f"{name} ({rows:,} × {columns:,}) becomes two factors of rank {record['rank']}{at_most}"]
    if record["shared_with"]:
        notes.append(f"{' and '.join(record['shared_with'])}, tied to it, will use the same factors")
    return (*notes, "the result is in modelzip's own layout: opening it needs `import modelzip.weights`")


EMBEDDING: Final = StructuralMethod(plan_embedding, build_embedding, factor_embedding, _memory, _notes)
