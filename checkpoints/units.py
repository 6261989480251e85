"""Heads and neurons: which rows and columns of which parameters belong to each, in any model.

Found by the names that linears have inside their module (a small table) and proven by their shapes: the columns of the
output projection must be the units side by side, and the rows of the input projections as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .blocks import Structure
from .errors import CheckpointError

Axis: TypeAlias = Literal["query", "pair", "neuron"]
"""What is counted along a dimension: query heads, pairs of key and value heads, neurons."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a dimension in which each unit of `axis` has `width` entries, one unit after the other."""

    axis: Axis
    width: int


@dataclass(frozen=True)
class Piece:
    """A parameter that goes with the units: along `dim` it is these segments, one after the other."""

    parameter: str
    dim: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Units:
    """The heads of one attention, or the neurons of one feed-forward.

    output: module path of the linear whose input columns are the units, `width` columns each. counts: of each axis.
    resized: the linears whose shapes change. numbers: attributes of `module` that hold counts, with the axis.
    """

    block: int
    module: str
    output: str
    width: int
    counts: Mapping[Axis, int]
    pieces: tuple[Piece, ...]
    resized: tuple[str, ...]
    config_only: bool = False  # its forward takes the counts from the config, not from the shapes of its weights

    @property
    def count(self) -> int:
        """Query heads, or neurons."""
        return self.counts["query" if "query" in self.counts else "neuron"]

    @property
    def group(self) -> int:
        """Query heads to a pair of key and value heads; 1 for neurons."""
        return self.count // self.counts.get("pair", self.count)


@dataclass(frozen=True)
class _Layout:
    """Linears by their path inside a module. fused: query, key and value in one linear, or gate and up."""

    inputs: tuple[str, ...]
    output: str
    fused: Literal["", "stacked", "interleaved"] = ""
    config_only: bool = False


_ATTENTIONS: Final = (
    _Layout(("q_proj", "k_proj", "v_proj"), "o_proj"),
    _Layout(("q_proj", "k_proj", "v_proj"), "out_proj"),
    _Layout(("q_proj", "k_proj", "v_proj"), "dense"),
    _Layout(("self.query", "self.key", "self.value"), "output.dense"),
    _Layout(("q_lin", "k_lin", "v_lin"), "out_lin"),
    _Layout(("c_attn",), "c_proj", "stacked"),
    _Layout(("qkv_proj",), "o_proj", "stacked", config_only=True),
    _Layout(("query_key_value",), "dense", "interleaved"),
)
_FEED_FORWARDS: Final = (
    _Layout(("gate_proj", "up_proj"), "down_proj"),
    _Layout(("up_proj",), "down_proj"),
    _Layout(("gate_up_proj",), "down_proj", "stacked"),
    _Layout(("fc1",), "fc2"),
    _Layout(("c_fc",), "c_proj"),
    _Layout(("intermediate.dense",), "output.dense"),
    _Layout(("lin1",), "lin2"),
    _Layout(("dense_h_to_4h",), "dense_4h_to_h"),
    _Layout(("wi_0", "wi_1"), "wo"),
    _Layout(("wi",), "wo"),
)
_WIDTHS: Final = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_BY_HEAD: Final = ("alibi", "bloom", "falcon", "mpt")


def find_heads(model: nn.Module, structure: Structure) -> list[Units]:
    """The attentions of all blocks in their order. Raises CheckpointError with what stands in the way."""
    config = model.config
    kind = str(getattr(config, "model_type", ""))
    if kind in _BY_HEAD or getattr(config, "alibi", False):
        raise CheckpointError(f"what a head of {kind} attends to depends on its number, so none can be taken out")
    found = list(_find(model, structure, _ATTENTIONS, _heads))
    without = [block.name for number, block in enumerate(structure.blocks) if all(u.block != number for u in found)]
    if without:
        raise CheckpointError(f"{without[0]} has no query, key, value and output projection that modelzip knows")
    return found


def find_neurons(model: nn.Module, structure: Structure) -> list[Units]:
    """The feed-forwards of all blocks in their order. Raises CheckpointError with what stands in the way."""
    experts = [name for name, reason in structure.left_alone if reason in ("router", "fused experts")]
    if experts:
        raise CheckpointError(f"{experts[0]} belongs to a mixture of experts, whose neurons modelzip doesn't take out")
    found = list(_find(model, structure, _FEED_FORWARDS, _neurons))
    without = [block.name for number, block in enumerate(structure.blocks) if all(u.block != number for u in found)]
    if without:
        raise CheckpointError(f"{without[0]} has no feed-forward whose projections modelzip knows")
    return found


def indices(piece: Piece, kept: Mapping[Axis, Tensor], counts: Mapping[Axis, int]) -> Tensor:
    """The entries of `piece` along its dimension that the kept units (int64, ascending, by axis) hold."""
    found, start = [], 0
    for segment in piece.segments:
        inside = torch.arange(segment.width)
        found.append((start + kept[segment.axis][:, None] * segment.width + inside).flatten())
        start += counts[segment.axis] * segment.width
    return torch.cat(found)


def _find(
    model: nn.Module,
    structure: Structure,
    layouts: tuple[_Layout, ...],
    make: Callable[[int, str, nn.Module, _Layout], Units],
) -> Iterator[Units]:
    for number, block in enumerate(structure.blocks):
        for path, module in model.get_submodule(block.name).named_modules():
            children = dict(module.named_modules())
            for layout in layouts:
                if all(isinstance(children.get(name), nn.Linear | Conv1D) for name in (*layout.inputs, layout.output)):
                    yield make(number, f"{block.name}.{path}".removesuffix("."), module, layout)
                    break


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def _heads(block: int, path: str, module: nn.Module, layout: _Layout) -> Units:
    holder = module.get_submodule("self") if layout.inputs[0].startswith("self.") else module
    width = next((value for name in _WIDTHS if isinstance(value := getattr(holder, name, None), int)), 0)
    columns = _shape(module.get_submodule(layout.output))[1]
    if not width or columns % width:
        raise CheckpointError(f"the size of the heads of {path} can't be told from its modules")
    heads = columns // width
    rows = [_shape(module.get_submodule(name))[0] for name in layout.inputs]
    if layout.fused:
        pairs = heads if layout.fused == "interleaved" else (rows[0] // width - heads) // 2
        expected = [(heads + 2 * pairs) * width]
    else:
        pairs = rows[1] // width
        expected = [columns, pairs * width, pairs * width]
    if rows != expected or pairs < 1 or heads % pairs:
        raise CheckpointError(
            f"{path} has projections of {' + '.join(map(str, rows))} rows where {heads} heads of {width} need "
            f"{' + '.join(map(str, expected))}"
        )
    _refuse_parameters_of_heads(path, module, layout, sizes={heads, columns, pairs * width} - {width})
    pieces: list[Piece] = []
    if layout.fused == "interleaved":
        pieces += _rows(path, module, layout.inputs[0], (Segment("query", 3 * width),))
    elif layout.fused:
        axes: tuple[Axis, ...] = ("query", "pair", "pair")
        pieces += _rows(path, module, layout.inputs[0], tuple(Segment(axis, width) for axis in axes))
    else:
        for name, axis in zip(layout.inputs, ("query", "pair", "pair"), strict=True):
            pieces += _rows(path, module, name, (Segment("pair" if axis == "pair" else "query", width),))
    pieces.append(_columns(path, module, layout.output, Segment("query", width)))
    return _units(block, path, layout, width, {"query": heads, "pair": pairs}, pieces)


def _neurons(block: int, path: str, module: nn.Module, layout: _Layout) -> Units:
    count = _shape(module.get_submodule(layout.output))[1]
    stretches = 2 if layout.fused else 1
    pieces: list[Piece] = []
    for name in layout.inputs:
        rows = _shape(module.get_submodule(name))[0]
        if rows != stretches * count:
            raise CheckpointError(f"{path}.{name} has {rows} rows where {layout.output} takes {count} columns")
        pieces += _rows(path, module, name, (Segment("neuron", 1),) * stretches)
    pieces.append(_columns(path, module, layout.output, Segment("neuron", 1)))
    return _units(block, path, layout, 1, {"neuron": count}, pieces)


def _units(
    block: int, path: str, layout: _Layout, width: int, counts: Mapping[Axis, int], pieces: list[Piece]
) -> Units:
    resized = tuple(f"{path}.{name}" for name in (*layout.inputs, layout.output))
    return Units(block, path, resized[-1], width, counts, tuple(pieces), resized, layout.config_only)


def _rows(path: str, module: nn.Module, name: str, segments: tuple[Segment, ...]) -> Iterator[Piece]:
    linear = module.get_submodule(name)
    yield Piece(f"{path}.{name}.weight", 1 if isinstance(linear, Conv1D) else 0, segments)
    if linear.bias is not None:
        yield Piece(f"{path}.{name}.bias", 0, segments)


def _columns(path: str, module: nn.Module, name: str, segment: Segment) -> Piece:
    transposed = isinstance(module.get_submodule(name), Conv1D)
    return Piece(f"{path}.{name}.weight", 0 if transposed else 1, (segment,))


def _refuse_parameters_of_heads(path: str, module: nn.Module, layout: _Layout, *, sizes: set[int]) -> None:
    """Norms over all heads at once, sinks, biases of positions: what a head's removal would change for the others."""
    linears = (*layout.inputs, layout.output)
    beside = layout.output.rpartition(".")[0]
    for name, parameter in module.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in linears or (beside and name.startswith(f"{beside}.")):
            continue
        if sizes & set(parameter.shape):
            raise CheckpointError(f"{path}.{name} holds something for every head that modelzip can't cut with them")
