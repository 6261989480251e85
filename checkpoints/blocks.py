"""The structure of any transformer: its blocks in order, the linears in each, and what must be left alone.

Found by structure, not by model type: a block is an element of an outermost `ModuleList` of like modules that hold
linears, an expert is a member of a list (or of a 3-D parameter) inside a block, a router is what scores the experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import nn
from transformers.pytorch_utils import Conv1D

from modelzip.weights.students import OWN_MODELS

from .errors import CheckpointError
from .index import Checkpoint
from .names import NameMap

TIED: Final = "tied to another weight"


@dataclass(frozen=True)
class Linear:
    """A linear layer that a method may compress. sharers: other modules that use the same weight."""

    name: str  # module path
    tensor: str  # of its weight in the checkpoint; of a compressed one, the name that the weight would have
    shape: tuple[int, int]  # (out, in)
    transposed: bool  # the weight is stored [in, out], as transformers' Conv1D does
    sharers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """linears: those whose weights are stored as theirs. sharers: by module path, the linear whose weight it uses."""

    name: str  # module path
    linears: tuple[Linear, ...]
    sharers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Structure:
    blocks: tuple[Block, ...]  # in the order in which they run, an encoder's before its decoder's
    rest: tuple[str, ...]  # names of parameters and persistent buffers outside the blocks
    tied: tuple[tuple[str, ...], ...]
    left_alone: tuple[tuple[str, str], ...]  # (module or parameter, reason)


def is_own(checkpoint: Checkpoint) -> bool:
    """Whether the model is one of our own kinds, which run whole: they have no blocks to be streamed or compressed."""
    return checkpoint.config.get("model_type") in OWN_MODELS


def find_structure(model: nn.Module, checkpoint: Checkpoint, *, names: NameMap | None = None) -> Structure:
    """Raises CheckpointError for a model without blocks that hold linears, and for students of our own kinds."""
    if is_own(checkpoint):
        raise CheckpointError(
            f"{checkpoint.source} ({type(model).__name__}) is a student that no other method takes any further: "
            "compress the classifier that it was made from, before this student is made."
        )
    names = names if names is not None else NameMap(model, checkpoint)
    left_alone: list[tuple[str, str]] = []
    paths = [f"{stack}.{index}" for stack in _stacks(model) for index in range(len(model.get_submodule(stack)))]  # type: ignore[arg-type]
    owners = _owners(model, paths, names)
    blocks = [
        _block(path, model.get_submodule(path), names=names, owners=owners, left_alone=left_alone) for path in paths
    ]
    # Layers that are all one still run, and are evaluated, block by block.
    if not any(block.linears for block in blocks) and TIED not in dict(left_alone).values():
        raise CheckpointError(
            f"{checkpoint.source}: {type(model).__name__} has no repeated blocks with linear layers to compress."
        )
    inside = tuple(f"{block.name}." for block in blocks)
    rest = tuple(name for name in model.state_dict() if not name.startswith(inside))
    left_alone.extend(_outside(model, rest, names.tied))
    return Structure(tuple(blocks), rest, names.tied, tuple(left_alone))


def _stacks(model: nn.Module) -> list[str]:
    """Paths of the outermost lists of blocks, in the order in which the model registers them."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            kinds = Counter(type(child) for child in module)
            like = kinds.most_common(1)[0][1] if kinds else 0
            holds_blocks = any(not _is_linear(child) and any(map(_is_linear, child.modules())) for child in module)
            if holds_blocks and 2 * like >= len(module):
                found.append(name)
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _owners(model: nn.Module, blocks: list[str], names: NameMap) -> dict[str, str]:
    """Of linears in blocks that share a weight with each other alone: the one under whose name it is stored."""
    inside = tuple(f"{block}." for block in blocks)
    found = {}
    for group in names.tied:
        modules = [name.removesuffix(".weight") for name in group if name.endswith(".weight")]
        if len(modules) == len(group) and all(
            one.startswith(inside) and _is_linear(model.get_submodule(one)) for one in modules
        ):
            found.update(dict.fromkeys(modules, names.owner(group[0]).removesuffix(".weight")))
    return found


def _block(
    path: str,
    block: nn.Module,
    *,
    names: NameMap,
    owners: Mapping[str, str],
    left_alone: list[tuple[str, str]],
) -> Block:
    routers = dict(_routers(block))
    tied = {name for group in names.tied for name in group}
    linears = []
    sharers = {}
    for name, module in block.named_modules():
        full = f"{path}.{name}" if name else path
        weight = f"{full}.weight"
        if name in routers:
            left_alone.append((full, "router"))
        elif not _is_linear(module):
            left_alone.extend((f"{full}.{leaf}", reason) for leaf, reason in _odd_parameters(module))
        elif weight in tied and full not in owners:
            left_alone.append((full, TIED))
        elif isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            left_alone.append((full, "its weight is used without calling it"))
        elif owners.get(full, full) != full:
            sharers[full] = owners[full]
        elif (tensor := _tensor(names, full)) is None:
            left_alone.append((full, "stored fused with other weights"))
        else:
            others = tuple(other for other, owner in owners.items() if owner == full != other)
            linears.append(_linear(full, module, tensor, others))
    return Block(path, tuple(linears), sharers)


def _tensor(names: NameMap, module: str) -> str | None:
    parts = names.parts(module)
    if parts:
        suffix, tensor = next(iter(parts.items()))
        return tensor.removesuffix(suffix) + "weight"
    return names.source(f"{module}.weight")


def _linear(name: str, module: nn.Module, tensor: str, sharers: tuple[str, ...]) -> Linear:
    rows, columns = module.get_parameter("weight").shape
    transposed = isinstance(module, Conv1D)
    return Linear(name, tensor, (columns, rows) if transposed else (rows, columns), transposed, sharers)


def _routers(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What scores the experts: beside a module of E experts, any matrix of E rows, or of one row (a gate)."""
    for parent_name, parent in block.named_modules():
        experts = {name: count for name, child in parent.named_children() if (count := _expert_count(child)) > 1}
        for name, module in parent.named_modules() if experts else ():
            weight = module._parameters.get("weight")
            if name.split(".")[0] in experts or weight is None or weight.ndim != 2:
                continue
            if weight.shape[0] in {1, *experts.values()}:
                yield f"{parent_name}.{name}".strip("."), module


def _expert_count(module: nn.Module) -> int:
    """How many experts this module holds itself; 0 if it isn't a set of experts."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        children = list(module.children())
        alike = len({type(child) for child in children}) == 1
        composite = all(not _is_linear(child) and any(map(_is_linear, child.modules())) for child in children)
        return len(children) if alike and composite else 0
    counts = {parameter.shape[0] for parameter in module.parameters(recurse=False) if _is_stack(module, parameter)}
    return counts.pop() if len(counts) == 1 else 0


def _is_stack(module: nn.Module, parameter: nn.Parameter) -> bool:
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    return parameter.ndim == 3 and not convolution


def _odd_parameters(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Matrices of a module that isn't a linear: none of them is compressed."""
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.ndim < 2:
            continue
        if isinstance(module, nn.Embedding):
            yield name, "embedding"
        elif isinstance(module, nn.modules.conv._ConvNd):
            yield name, "convolution"
        elif _is_stack(module, parameter):
            yield name, "fused experts"
        else:
            yield name, "not a linear layer"


def _outside(model: Any, rest: tuple[str, ...], tied: tuple[tuple[str, ...], ...]) -> Iterator[tuple[str, str]]:
    head = model.get_output_embeddings()
    for name in rest:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module._parameters.get(leaf)
        if parameter is None or parameter.ndim < 2:
            continue
        twins = [member for group in tied if name in group for member in group if member != name]
        with_twin = f", tied to {twins[0]}" if twins else ""
        if isinstance(module, nn.Embedding):
            yield path, "embedding" + with_twin
        elif module is head:
            yield path, "output head" + with_twin
        elif _is_linear(module):
            yield path, "outside the blocks (pooler, classifier or head)" + with_twin
        else:
            yield name, "outside the blocks, not a linear layer"
