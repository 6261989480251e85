"""A checkpoint whose experts are seen one by one: a tensor for each matrix of each expert, cut out as it is read.

Files hold experts as one tensor for all (3-D), or one by one under names of their own, of which transformers makes the
3-D ones. Either way, no more is read for an expert than what it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from modelzip.weights.experts import BIAS, UNFUSED, fused_experts, projections_of
from modelzip.weights.layouts import MODELZIP, quantization_config

from .headers import ITEM_SIZES, TensorInfo
from .index import DTYPES, Checkpoint, read_tensors
from .names import Conversion, NameMap
from .skeleton import skeleton


class Slice(Protocol):
    """One expert's part of a 3-D parameter."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors that it is made of."""

    def read(self, base: Checkpoint, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
        """It, as the parameter holds it."""


@dataclass(frozen=True)
class Cut:
    """The expert-th entry of a stored tensor."""

    source: str
    expert: int

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def read(self, base: Checkpoint, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
        whole = base.tensors[self.source]
        nbytes = whole.nbytes // whole.shape[0]
        place = replace(whole, shape=whole.shape[1:], nbytes=nbytes, offset=whole.offset + self.expert * nbytes)
        return read_tensors([place], dtype=dtype, device=device)[self.source]


@dataclass(frozen=True)
class Made:
    """What a converter makes of the tensors of one expert. target: the parameter."""

    conversion: Conversion
    model: Any
    target: str

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.conversion.sources)

    def read(self, base: Checkpoint, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
        tensors = base.read(self.sources, dtype=dtype, device=device)
        return self.conversion.run(self.model, tensors)[self.target][0]


@dataclass(frozen=True)
class Piece:
    """A tensor of one expert's linear. shape: in the parameter, which holds a weight as [in, out] if transposed."""

    slice: Slice
    shape: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True, eq=False)
class UnfusedCheckpoint(Checkpoint):
    """base: what is read, as it is on disk. pieces: by the name of the tensor that is asked for."""

    base: Checkpoint = field(kw_only=True)
    pieces: Mapping[str, Piece] = field(kw_only=True)

    @property
    def made_names(self) -> tuple[str, ...]:
        return tuple(self.pieces)

    def read(
        self, names: Iterable[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """These tensors, those of experts cut out of what is on disk."""
        wanted = list(names)
        found = self.base.read((name for name in wanted if name not in self.pieces), dtype=dtype, device=device)
        for name in wanted:
            if name in self.pieces:
                piece = self.pieces[name]
                tensor = piece.slice.read(self.base, dtype, device)
                found[name] = (tensor.T if piece.transposed else tensor).contiguous()
        return found


def unfused(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the experts of its mixtures one by one; itself where there are none that can be taken apart.

    All of them or none: transformers' converters, which must not run on them, are for all layers. One that holds
    weights compressed in another layout than modelzip's stays as it is: nothing but that can say where its experts are.
    """
    config = checkpoint.quantization or {}
    if config.get("quant_method", MODELZIP) != MODELZIP:
        return checkpoint
    model = skeleton(checkpoint)
    paths = fused_experts(model)
    if not paths:
        return checkpoint
    names = NameMap(model, checkpoint)
    pieces: dict[str, Piece] = {}
    for path in paths:
        fused: Any = model.get_submodule(path)
        for leaf, parameter in fused._parameters.items():
            made = list(_slices(f"{path}.{leaf}", names, model, parameter.shape))
            if len(made) != parameter.shape[0]:
                return checkpoint
            projection = leaf.removesuffix(BIAS)
            suffix = "bias" if projection != leaf else "weight"
            assert projection in projections_of(fused)
            is_turned = fused.is_transposed and suffix == "weight"
            shape = tuple(parameter.shape[1:])
            pieces |= {f"{path}.{e}.{projection}.{suffix}": Piece(one, shape, is_turned) for e, one in enumerate(made)}
    return _view(checkpoint, pieces, paths)


def _view(checkpoint: Checkpoint, pieces: Mapping[str, Piece], paths: list[str]) -> Checkpoint:
    taken = {source for piece in pieces.values() for source in piece.slice.sources}
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in taken}
    tensors |= {name: _info(name, piece, checkpoint) for name, piece in pieces.items()}
    own = checkpoint.quantization or quantization_config({}, layout=MODELZIP, linears=())
    return UnfusedCheckpoint(
        folder=checkpoint.folder,
        config={**checkpoint.config, "quantization_config": {**own, UNFUSED: paths}},
        tensors=tensors,
        source=checkpoint.source,
        base=checkpoint,
        pieces=pieces,
    )


def _slices(parameter: str, names: NameMap, model: Any, shape: torch.Size) -> Iterator[Slice]:
    """The experts' parts of a 3-D parameter (2-D for biases), in order; too few where it can't be taken apart."""
    stored = names.source(parameter)
    if stored is not None:
        yield from (Cut(stored, expert) for expert in range(shape[0]))
        return
    conversion = names.conversion(parameter)
    if conversion is None:
        return
    of_pattern: dict[str, list[str]] = {}
    for pattern, name in conversion.sources:
        of_pattern.setdefault(pattern, []).append(name)
    if any(len(found) != shape[0] for found in of_pattern.values()):
        return
    for expert in range(shape[0]):
        mine = [(pattern, found[expert]) for pattern, found in of_pattern.items()]
        one = Made(replace(conversion, sources=mine), model, parameter)
        if not _is_one(one, names.checkpoint, shape):
            return
        yield one


def _is_one(slice: Made, checkpoint: Checkpoint, shape: torch.Size) -> bool:
    """Whether the converter makes one expert of one expert's tensors: tried on the meta device."""
    infos = {name: checkpoint.tensors[name] for name in slice.sources}
    if len({one.dtype for one in infos.values()}) > 1:
        return False
    empty = {name: torch.empty(one.shape, dtype=DTYPES[one.dtype], device="meta") for name, one in infos.items()}
    try:
        made = slice.conversion.run(slice.model, empty)
    except (RuntimeError, ValueError, IndexError, KeyError):
        return False
    return set(made) == {slice.target} and made[slice.target].shape == (1, *shape[1:])


def _info(name: str, piece: Piece, base: Checkpoint) -> TensorInfo:
    """The header of a tensor that no file holds as it is."""
    first = base.tensors[piece.slice.sources[0]]
    shape = piece.shape[::-1] if piece.transposed else piece.shape
    return replace(first, name=name, shape=shape, nbytes=math.prod(shape) * ITEM_SIZES[first.dtype])
