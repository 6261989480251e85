"""Layers that share one set of weights: the fit that they begin with, and the method as the engine sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import psutil
import torch
from torch import Tensor

from modelzip.checkpoints.blocks import Block, Linear
from modelzip.checkpoints.errors import ModelzipError
from modelzip.checkpoints.index import DTYPES, Checkpoint
from modelzip.checkpoints.rewrite import Rewrite
from modelzip.checkpoints.streamed import StreamedModel, start
from modelzip.checkpoints.walk import Walk
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.compressors.factorize.settings import Share
from modelzip.compressors.factorize.share import LeastSquares
from modelzip.compressors.layer import UnsuitableError
from modelzip.recipes.schema import Recipe

from .calibrate import batches, forward_inputs
from .context import Context
from .hessian import finish
from .inputs import sums_of_inputs
from .layer_stage import HIDDEN_SHARE
from .measure import open_streamed
from .room import memory_needed
from .share_plan import Group, build_share, part_of, plan_share
from .smaller import StructuralMethod, headers_of
from .text import Windows


def fit_share(
    settings: Share,
    checkpoint: Checkpoint,
    rewrite: Rewrite,
    writer: CheckpointWriter,
    windows: Windows | None,
    context: Context,
) -> None:
    """Write the groups whose linears begin at the least-squares fit, each when the last of its layers has run.

    The inputs are those of the original model. Norms and biases are means, as with `start: average`.
    """
    if settings.start == "average":
        return
    assert windows is not None, "the plan says that this needs data"
    streamed = open_streamed(checkpoint, context.recipe.dtype, context.device)
    data = batches(windows.tokens, context.recipe.calibration.batch_size, forward_inputs(streamed.model))
    groups = [g for g in plan_share(settings, checkpoint) if part_of(streamed.structure, g) not in writer.done]
    if not groups:
        return
    limit = int(HIDDEN_SHARE * psutil.virtual_memory().available)
    walk = streamed.walk(data, spill_limit=limit, spill_folder=writer.folder)
    blocks = streamed.structure.blocks
    try:
        start(walk, streamed)
        for number, block in enumerate(blocks[: 1 + max(group.blocks[-1] for group in groups)]):
            context.progress.step("fit", number, len(blocks), block.name)
            group = next((group for group in groups if number in group.blocks), None)
            if group is None:
                streamed.through(walk, block)
                continue
            if number == group.blocks[0]:
                fits: dict[str, LeastSquares] = {}
            _add_layer(fits, group, block, streamed=streamed, walk=walk)
            if number == group.blocks[-1]:
                _write_fit(settings, group, fits, streamed=streamed, rewrite=rewrite, writer=writer)
                fits = {}
        context.progress.step("fit", len(blocks), len(blocks))
    finally:
        walk.close()


def _shared_linears(group: Group, block: Block) -> Iterator[tuple[str, Linear]]:
    """The linears of a layer that are to be shared, each with its weight's name inside the layer."""
    for linear in block.linears:
        leaf = f"{linear.name.removeprefix(f'{block.name}.')}.weight"
        if leaf in group.leaves:
            yield leaf, linear


def _add_layer(
    fits: dict[str, LeastSquares], group: Group, block: Block, *, streamed: StreamedModel, walk: Walk
) -> None:
    """Run all batches through a layer and add what its linears do with their inputs to the fits, by leaf."""
    linears = dict(_shared_linears(group, block))
    streamed.load(block)
    sums = sums_of_inputs(streamed, walk, block, {linear.name: True for linear in linears.values()})
    streamed.free(block)
    hessians: dict[int, Tensor] = {}
    for leaf, linear in linears.items():
        found = sums.get(linear.name)
        if found is None:
            raise ModelzipError(f"No calibration token reached {linear.name}: take --start average.")
        if id(found) not in hessians:
            hessians[id(found)] = finish(found.total, found.tokens)
        fits.setdefault(leaf, LeastSquares()).add(_weight(streamed.checkpoint, linear), hessians[id(found)].cpu())


def _weight(checkpoint: Checkpoint, linear: Linear) -> Tensor:
    weight = checkpoint.read([linear.tensor], dtype=torch.float32)[linear.tensor]
    return weight.T if linear.transposed else weight


def _write_fit(
    settings: Share,
    group: Group,
    fits: Mapping[str, LeastSquares],
    *,
    streamed: StreamedModel,
    rewrite: Rewrite,
    writer: CheckpointWriter,
) -> None:
    """The part of a group: its linears' weights as fitted, all else as it would be without a fit."""
    checkpoint, block = streamed.checkpoint, streamed.structure.blocks[group.blocks[0]]
    pieces = rewrite.parts[block.name]
    made: dict[str, Tensor] = {}
    records = {}
    for leaf, linear in _shared_linears(group, block):
        try:
            weight = fits[leaf].solve(damping=settings.damping)
        except UnsuitableError as error:
            raise ModelzipError(f"{linear.name} couldn't be fitted: {error}; take --start average.") from None
        kept = DTYPES[checkpoint.tensors[linear.tensor].dtype]
        made[linear.tensor] = weight.to(kept)
        records[linear.name] = {
            "method": settings.method,
            "error": fits[leaf].error(weight),
            "error_of_average": fits[leaf].error(fits[leaf].mean()),
            "note": "",
        }
    made = {name: made[name] if name in made else piece.make(checkpoint) for name, piece in pieces.items()}
    replaces = dict.fromkeys(name for piece in pieces.values() for name in piece.sources)
    writer.write_part(block.name, made, replaces=replaces, record={"modules": records})


def _memory(settings: Share, checkpoint: Checkpoint, recipe: Recipe) -> int:
    headers = headers_of(checkpoint)
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    layer = max(4 * sum(one.shape[0] * one.shape[1] for one in block.linears) for block in headers.structure.blocks)
    if settings.start == "average":
        return layer + 6 * largest
    sums = max(
        sum(16 * one.shape[0] * one.shape[1] + 12 * one.shape[1] ** 2 for one in block.linears)
        for block in headers.structure.blocks
    )
    needed = memory_needed(recipe, checkpoint, headers.structure, headers.model.config, needs_data=True)
    return needed + layer + sums


def _notes(settings: Share, rewrite: Rewrite) -> tuple[str, ...]:
    what = {"all": "layers", "attention": "attentions", "feed-forward": "feed-forwards"}[settings.scope]
    groups = [names for record in rewrite.records.values() for names in record["groups"]]
    return (
        f"{sum(map(len, groups))} {what} become {len(groups)}, held once in the file and in memory; a forward pass "
        "takes as long as ever",
        "the result is in modelzip's own layout: opening it needs `import modelzip.weights`",
    )


SHARE: Final = StructuralMethod(plan_share, build_share, None, _memory, _notes, fit_share)
