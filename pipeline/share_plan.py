"""Layers that share one set of weights: which ones, where the weights begin, and the checkpoint that stores them once.

`scope: all` shares every parameter of a layer, norms and biases too, as ALBERT does. `attention` and `feed-forward`
share the linears of that part with their biases; norms stay each layer's own, also those that stand beside the part:
they are a few thousandths of a layer, and scale the shared weights for each layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from modelzip.checkpoints.blocks import Structure
from modelzip.checkpoints.errors import CheckpointError, ProblemsError
from modelzip.checkpoints.index import DTYPES, Checkpoint, TensorInfo
from modelzip.checkpoints.rewrite import Rewrite, expected, opens
from modelzip.checkpoints.units import find_neurons
from modelzip.compressors.factorize.settings import Share
from modelzip.compressors.factorize.share import average, runs
from modelzip.weights.dense import Dense
from modelzip.weights.layouts import MODELZIP, quantization_config
from modelzip.weights.value import dtype_name

from .smaller import Headers, headers_of


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
        parts[part_of(headers.structure, group)] = made
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


def part_of(structure: Structure, group: Group) -> str:
    """The part of the output that holds a group's weights: the name of its first layer."""
    return structure.blocks[group.blocks[0]].name
