"""A checkpoint whose tensors are changed as they are read: scaled, turned, or put under a second name.

Nothing is written for it: whatever takes a checkpoint (a streamed model, a plan, an engine) sees the changed tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .headers import TensorInfo
from .index import DTYPES, Checkpoint


class Step(Protocol):
    """One thing that is done to a tensor: fp32, a matrix as [out, in]."""

    def apply(self, tensor: Tensor) -> Tensor:
        """The changed tensor, of the same shape."""


class Turn(Protocol):
    """What turns rows."""

    def turn(self, x: Tensor) -> Tensor:
        """Rows x [..., n], turned."""


@dataclass(frozen=True)
class Scaled:
    """Rows (and entries of vectors) or columns multiplied by these factors."""

    by: Tensor
    columns: bool = False

    def apply(self, tensor: Tensor) -> Tensor:
        by = self.by.to(tensor)
        return tensor * (by if self.columns or tensor.ndim == 1 else by[:, None])


@dataclass(frozen=True)
class Turned:
    """W Q, the columns turned, or Qᵀ W, the rows; a vector as a column."""

    by: Turn
    columns: bool = False

    def apply(self, tensor: Tensor) -> Tensor:
        if self.columns or tensor.ndim == 1:
            return self.by.turn(tensor)
        return self.by.turn(tensor.T).T


@dataclass(frozen=True)
class Moved:
    """A vector with this number added to each entry."""

    by: float

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor + self.by


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor. source: the one that it is made of. transposed: a matrix is stored [in, out]."""

    source: str
    steps: tuple[Step, ...]
    transposed: bool = False

    def then(self, *steps: Step) -> Change:
        """The same with more to be done after it."""
        return replace(self, steps=(*self.steps, *steps))

    def made(self, stored: Tensor) -> Tensor:
        """From the tensor as it is stored, in fp32."""
        tensor = stored.float()
        tensor = tensor.T if self.transposed else tensor
        for step in self.steps:
            tensor = step.apply(tensor)
        return (tensor.T if self.transposed else tensor).contiguous()


@dataclass(frozen=True, eq=False)
class ChangedCheckpoint(Checkpoint):
    """base: what is read. changes: by the name of the tensor that is asked for."""

    base: Checkpoint = field(kw_only=True)
    changes: Mapping[str, Change] = field(kw_only=True)

    @property
    def original(self) -> Checkpoint:
        """What nothing is changed in."""
        return self.base.original if isinstance(self.base, ChangedCheckpoint) else self.base

    @property
    def made_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.base.made_names, *self.changes]))

    def read(
        self, names: Iterable[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """These tensors, the changed ones rounded once, to `dtype` (None: as stored)."""
        wanted = list(names)
        found = self.base.read((name for name in wanted if name not in self.changes), dtype=dtype, device=device)
        for name in wanted:
            if name in self.changes:
                change = self.changes[name]
                stored = self.base.read([change.source], dtype=torch.float32, device=device)[change.source]
                found[name] = change.made(stored).to(dtype or DTYPES[self.tensors[name].dtype])
        return found


def changed(base: Checkpoint, changes: Mapping[str, Change], *, config: dict[str, Any] | None = None) -> Checkpoint:
    """`base` as it is with these changes. config: of the result, if it isn't that of `base`."""
    tensors: dict[str, TensorInfo] = dict(base.tensors)
    tensors |= {name: replace(base.tensors[change.source], name=name) for name, change in changes.items()}
    return ChangedCheckpoint(
        folder=base.folder,
        config=base.config if config is None else config,
        tensors=tensors,
        source=base.source,
        base=base,
        changes=dict(changes),
    )


def unrounded(checkpoint: Checkpoint) -> Checkpoint:
    """The same, but that changed tensors are given in fp32 where no type is asked for: what the changes alone do."""
    if not isinstance(checkpoint, ChangedCheckpoint):
        return checkpoint
    tensors = dict(checkpoint.tensors)
    changed_names = set(checkpoint.made_names) - set(checkpoint.original.made_names)
    tensors |= {name: replace(tensors[name], dtype="F32") for name in changed_names}
    return replace(checkpoint, base=unrounded(checkpoint.base), tensors=tensors)


def as_planned(checkpoint: Checkpoint) -> Checkpoint:
    """Headers alone of what will be there."""
    return Checkpoint(checkpoint.folder, checkpoint.config, checkpoint.tensors, checkpoint.source)
