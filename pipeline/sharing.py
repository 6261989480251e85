"""Layers that share one set of weights: which ones, where the weights begin, and the checkpoint that stores them once.

`scope: all` shares every parameter of a layer, norms and biases too, as ALBERT does. `attention` and `feed-forward`
share the linears of that part with their biases; norms stay each layer's own, also those that stand beside the part:
they are a few thousandths of a layer, and scale the shared weights for each layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import psutil
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from modelzip.checkpoints.blocks import Block, Linear, Structure
from modelzip.checkpoints.errors import CheckpointError, ModelzipError, ProblemsError
from modelzip.checkpoints.index import DTYPES, Checkpoint, TensorInfo
from modelzip.checkpoints.rewrite import Rewrite, expected, opens
from modelzip.checkpoints.streamed import StreamedModel, start
from modelzip.checkpoints.units import find_neurons
from modelzip.checkpoints.walk import Walk
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.compressors.factorize.settings import Share
from modelzip.compressors.factorize.share import LeastSquares, average, runs
from modelzip.compressors.layer import UnsuitableError
from modelzip.recipes.schema import Recipe
from modelzip.weights.dense import Dense
from modelzip.weights.layouts import MODELZIP, quantization_config
from modelzip.weights.value import dtype_name

from .calibrate import batches, forward_inputs
from .context import Context
from .hessian import finish
from .inputs import sums_of_inputs
from .layer_stage import HIDDEN_SHARE
from .measure import open_streamed
from .room import memory_needed
from .smaller import Headers, StructuralMethod, headers_of
from .text import Windows


@dataclass(frozen=True)
class Mean:
    """The mean of the source's tensors of these names, which are alike, in their type.

    turned: the two dimensions are exchanged. A Conv1D's weight that is shared becomes a plain linear's, [out, in]:
    transformers takes all that is tied for that, and cuts biases to its rows.
    """

    sources: tuple[str, ...]
    turned: bool = False

    def like(self, source: Checkpoint) -> TensorInfo:
        first = source.tensors[self.sources[0]]
        return replace(first, shape=first.shape[::-1]) if self.turned else first

    def make(self, source: Checkpoint) -> Tensor:
        mean = average(source.read([name])[name] for name in self.sources).to(DTYPES[self.like(source).dtype])
        return mean.T.contiguous() if self.turned else mean


@dataclass(frozen=True)
class Group:
    """Layers that will share. blocks: numbers of theirs in the structure; the first one's weights are stored.

    leaves: the shared parameters' names inside a layer.
    """

    stack: str
    blocks: tuple[int, ...]
    leaves: tuple[str, ...]


def plan_share(settings: Share, checkpoint: Checkpoint) -> tuple[Group, ...]:
    """The groups of layers. Raises ProblemsError with what stands in the way, CheckpointError for unknown models."""
    quantization = checkpoint.quantization
    if quantization is not None and quantization.get("quant_method") != MODELZIP:
        raise ProblemsError([f"{checkpoint.source} is quantized already: share layers before quantizing"])
    headers = headers_of(checkpoint)
    stacks: dict[str, list[int]] = {}
    for number, block in enumerate(headers.structure.blocks):
        stacks.setdefault(block.name.rpartition(".")[0], []).append(number)
    for stack, numbers in stacks.items():
        if settings.groups >= len(numbers):
            raise ProblemsError(
                [f"groups {settings.groups} shares nothing among the {len(numbers)} layers of {stack}: take fewer"]
            )
    groups = []
    for stack, numbers in stacks.items():
        for run in runs(len(numbers), settings.groups):
            blocks = tuple(numbers[index] for index in run)
            if len(blocks) > 1:
                groups.append(Group(stack, blocks, _leaves(settings, headers, blocks)))
    for group in groups:
        _refuse_unfit(group, headers, checkpoint)
    return tuple(groups)


def _leaves(settings: Share, headers: Headers, blocks: tuple[int, ...]) -> tuple[str, ...]:
    """The parameters inside a layer that are to be shared. Raises ProblemsError if layers don't have the same."""
    linears = {} if settings.scope == "all" else _linears_of(settings.scope, headers)
    found: dict[int, list[str]] = {}
    for number in blocks:
        block = headers.model.get_submodule(headers.structure.blocks[number].name)
        owners = None if settings.scope == "all" else linears[number]
        leaves = [name for name, _ in block.named_parameters(remove_duplicate=False)]
        found[number] = [name for name in leaves if owners is None or name.rpartition(".")[0] in owners]
    first = found[blocks[0]]
    for number, leaves in found.items():
        if odd := sorted(set(leaves) ^ set(first)):
            has = number if odd[0] in leaves else blocks[0]
            raise ProblemsError(
                [f"the layers aren't alike: of those to be shared, not all have {_parameter(headers, has, odd[0])}"]
            )
    return tuple(first)


def _linears_of(scope: str, headers: Headers) -> dict[int, set[str]]:
    """By block, the linears of the attention or of the feed-forward, named from the block on.

    Feed-forwards are known by the names and shapes of their projections; all other linears are the attention's.
    """
    experts = [name for name, reason in headers.structure.left_alone if reason in ("router", "fused experts")]
    if experts:
        raise ProblemsError([f"{experts[0]} belongs to a mixture of experts, of whose layers modelzip shares no part"])
    inside: dict[int, set[str]] = {number: set() for number in range(len(headers.structure.blocks))}
    for units in find_neurons(headers.model, headers.structure):
        inside[units.block].update(units.resized)
    found = {}
    for number, block in enumerate(headers.structure.blocks):
        every = {linear.name for linear in block.linears}
        chosen = every & inside[number] if scope == "feed-forward" else every - inside[number]
        if not chosen:
            raise CheckpointError(f"{block.name} has no {scope} whose projections modelzip knows")
        found[number] = {name.removeprefix(f"{block.name}.") for name in chosen}
    return found


def _refuse_unfit(group: Group, headers: Headers, checkpoint: Checkpoint) -> None:
    """Raise ProblemsError unless each shared parameter is a tensor of the checkpoint, and alike in all layers."""
    tied = {name for names in headers.names.tied for name in names}
    for leaf in group.leaves:
        alike = set()
        for number in group.blocks:
            name = _parameter(headers, number, leaf)
            source = headers.names.source(name)
            if name in tied:
                raise ProblemsError([f"{name} is tied to another weight already: give the original model"])
            if source is None:
                raise ProblemsError([f"{name} isn't stored as a tensor of its own, but compressed or in pieces"])
            alike.add((checkpoint.tensors[source].shape, checkpoint.tensors[source].dtype))
        if len(alike) > 1:
            shapes = " and ".join(f"{'×'.join(map(str, shape))} {dtype}" for shape, dtype in sorted(alike))
            raise ProblemsError([f"the layers aren't alike: {leaf} is {shapes}"])


def build_share(settings: Share, checkpoint: Checkpoint, groups: tuple[Group, ...]) -> Rewrite:
    """The first layer of each group with what all of it will use. Raises CheckpointError if no such model opens."""
    headers = headers_of(checkpoint)
    parts: dict[str, dict[str, Mean]] = {}
    shared: dict[str, str] = {}
    modules: dict[str, Any] = {}
    records: dict[str, dict[str, Any]] = {}
    for group in groups:
        owner = group.blocks[0]
        made = {}
        for leaf in group.leaves:
            stored = _stored(headers, owner, leaf)
            turned = _is_turned(headers, owner, leaf)
            made[stored] = Mean(tuple(_stored(headers, number, leaf) for number in group.blocks), turned)
            if turned:
                info = made[stored].like(checkpoint)
                meta = {"kind": Dense.kind, "shape": list(info.shape), "dtype": dtype_name(DTYPES[info.dtype])}
                every = (_parameter(headers, number, leaf).removesuffix(".weight") for number in group.blocks)
                modules |= dict.fromkeys(every, meta)
            for number in group.blocks[1:]:
                shared[_parameter(headers, number, leaf)] = _parameter(headers, owner, leaf)
        parts[_part(headers.structure, group)] = made
        record: dict[str, Any] = {"method": settings.method, "scope": settings.scope, "start": settings.start}
        names = [headers.structure.blocks[number].name for number in group.blocks]
        records.setdefault(group.stack, {**record, "groups": [], "note": ""})["groups"].append(names)
    before = checkpoint.quantization or quantization_config({}, layout=MODELZIP, linears=[])
    quantization = {
        **before,
        "modules": {**before["modules"], **modules},
        "shared": {**before.get("shared", {}), **shared},
    }
    config = {**checkpoint.config, "quantization_config": quantization}
    rewrite = Rewrite(config=config, parts=parts, records=records)
    if problem := opens(expected(rewrite, checkpoint)):
        raise CheckpointError(problem)
    return rewrite


def _parameter(headers: Headers, block: int, leaf: str) -> str:
    return f"{headers.structure.blocks[block].name}.{leaf}"


def _is_turned(headers: Headers, block: int, leaf: str) -> bool:
    path, _, name = _parameter(headers, block, leaf).rpartition(".")
    return name == "weight" and isinstance(headers.model.get_submodule(path), Conv1D)


def _stored(headers: Headers, block: int, leaf: str) -> str:
    """The checkpoint's tensor of a parameter of which `_refuse_unfit` has found that it has one."""
    source = headers.names.source(_parameter(headers, block, leaf))
    assert source is not None
    return source


def _part(structure: Structure, group: Group) -> str:
    return structure.blocks[group.blocks[0]].name


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
    groups = [g for g in plan_share(settings, checkpoint) if _part(streamed.structure, g) not in writer.done]
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
