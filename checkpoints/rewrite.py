"""A checkpoint made from another one: tensors are cut, left out, renamed, or others put in their place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from .blocks import find_structure
from .errors import CheckpointError
from .headers import ITEM_SIZES, TensorInfo
from .index import Checkpoint
from .names import NameMap
from .skeleton import skeleton
from .writer import CheckpointWriter


class Piece(Protocol):
    """A tensor of the new checkpoint."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Tensors of the source that it takes the place of."""

    def like(self, source: Checkpoint) -> TensorInfo:
        """A tensor of its type, shape and size."""

    def make(self, source: Checkpoint) -> Tensor:
        """Its values."""


@dataclass(frozen=True)
class Cut:
    """What becomes of one tensor: of `source`, along each dimension these entries in this order (int64).

    transposed: the two dimensions are exchanged, after that.
    """

    source: str
    index: Mapping[int, Tensor] = field(default_factory=dict)
    transposed: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def like(self, source: Checkpoint) -> TensorInfo:
        before = source.tensors[self.source]
        shape = self.shape(before.shape)
        return replace(before, shape=shape, nbytes=math.prod(shape) * ITEM_SIZES[before.dtype])

    def make(self, source: Checkpoint) -> Tensor:
        return self.apply(source.read([self.source])[self.source])

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        after = tuple(len(self.index[dim]) if dim in self.index else size for dim, size in enumerate(before))
        return after[::-1] if self.transposed else after

    def apply(self, tensor: Tensor) -> Tensor:
        for dim, index in self.index.items():
            tensor = tensor.index_select(dim, index)
        return (tensor.T if self.transposed else tensor).contiguous()


@dataclass(frozen=True)
class Rewrite:
    """config: of the result. parts: what is written together, by the part's name; pieces by the new tensor's name.

    dropped: tensors that are left out, with the reason. Tensors that are named nowhere are copied. files: beside the
    weights; left_out: the source's that the result has no use for. records: for the report, by module.
    """

    config: dict[str, Any]
    parts: Mapping[str, Mapping[str, Piece]]
    dropped: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def expected(rewrite: Rewrite, source: Checkpoint) -> Checkpoint:
    """The checkpoint that will come out, from headers alone.

    Files and offsets are still the source's, so its tensors can't be read: names, types, shapes and sizes are right.
    """
    pieces = {name: piece for part in rewrite.parts.values() for name, piece in part.items()}
    gone = {*rewrite.dropped, *(name for piece in pieces.values() for name in piece.sources)}
    tensors = {name: info for name, info in source.tensors.items() if name not in gone}
    for name, piece in pieces.items():
        tensors[name] = replace(piece.like(source), name=name)
    return Checkpoint(folder=source.folder, config=rewrite.config, tensors=tensors, source=source.source)


def opens(checkpoint: Checkpoint) -> str | None:
    """None if config and tensors make a model; else why they don't."""
    try:
        model = skeleton(checkpoint)
        find_structure(model, checkpoint, names=NameMap(model, checkpoint))
    except CheckpointError as error:
        return str(error)
    return None


def write(rewrite: Rewrite, source: Checkpoint, writer: CheckpointWriter) -> None:
    """Write every part that isn't on disk yet, one part's tensors in memory at a time."""
    for reason in sorted(set(rewrite.dropped.values())):
        writer.drop((name for name, why in rewrite.dropped.items() if why == reason), reason)
    for part, pieces in rewrite.parts.items():
        if part in writer.done:
            continue
        made = {name: piece.make(source) for name, piece in pieces.items()}
        replaces = dict.fromkeys(name for piece in pieces.values() for name in piece.sources)
        writer.write_part(part, made, replaces=replaces, record={"modules": {}})


def with_number(config: Mapping[str, Any], aliases: Mapping[str, str], key: str, number: int) -> dict[str, Any]:
    """A config with `key` set, under each name that the file has for it (`aliases`: other name -> name)."""
    also = [alias for alias, name in aliases.items() if name == key and alias in config]
    return {**config, **dict.fromkeys([key, *also], number)}
