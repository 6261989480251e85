"""A stage's changes across neighbouring modules, made: a checkpoint whose tensors are changed as they are read.

The engine streams and compresses it like any other. Before that, it is compared with the original on a window of
tokens: an architecture that was misunderstood is found out before anything is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modelzip.checkpoints.blocks import Structure
from modelzip.checkpoints.changes import Change, ChangedCheckpoint, Moved, Scaled, Step, Turned, changed, unrounded
from modelzip.checkpoints.errors import ModelzipError
from modelzip.checkpoints.folds import Fold
from modelzip.checkpoints.index import DTYPES, Checkpoint
from modelzip.checkpoints.names import NameMap
from modelzip.checkpoints.residual import Residual
from modelzip.checkpoints.skeleton import skeleton
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.compressors.quantize.rotation import random_rotation

from .fold_plan import Folding
from .measure import probe

SAME: Final = 1e-3
"""Largest relative difference of outputs, in fp32, at which two models count as one; measured are 1e-6 and less."""


class _Changes:
    """Steps by tensor, gathered in the order in which they are to be done."""

    def __init__(self, checkpoint: Checkpoint, folding: Folding) -> None:
        self.model: nn.Module = skeleton(checkpoint)
        self.names, self.checkpoint, self.untied = NameMap(self.model, checkpoint), checkpoint, folding.untied
        self.made: dict[str, Change] = {}

    def add(self, module: str, leaf: str, *steps: Step) -> None:
        """More steps for a parameter, if the module has it."""
        owner = self.model.get_submodule(module)
        if owner._parameters.get(leaf) is None:
            return
        name = f"{module}.{leaf}"
        source = self.untied.get(name) or self.names.source(name) or self.names.source(self.names.owner(name))
        assert source is not None, "the plan has refused what isn't stored as it is"
        tensor = name if name in self.untied else source
        transposed = leaf == "weight" and isinstance(owner, Conv1D)
        self.made[tensor] = self.made.get(tensor, Change(source, (), transposed)).then(*steps)

    def value(self, module: str, leaf: str) -> Tensor:
        """A parameter as it is stored, in fp32."""
        source = self.names.source(f"{module}.{leaf}")
        assert source is not None
        return self.checkpoint.read([source], dtype=torch.float32)[source]

    def dtype(self, module: str, leaf: str) -> torch.dtype:
        """The type that a parameter is stored in."""
        source = self.names.source(f"{module}.{leaf}")
        assert source is not None
        return DTYPES[self.checkpoint.tensors[source].dtype]


def rotated(folding: Folding, checkpoint: Checkpoint, *, seed: int) -> Checkpoint:
    """The checkpoint with its residual stream and its values turned, as planned."""
    changes = _Changes(checkpoint, folding)
    generator = torch.Generator().manual_seed(seed)
    residual = folding.residual
    if residual is not None:
        _rotate_residual(residual, changes, generator)
    for fold in folding.heads:
        turn = random_rotation(fold.width, generator)
        for leaf in ("weight", "bias"):
            changes.add(fold.producer, leaf, Turned(turn))
        for linear in fold.linears:
            changes.add(linear, "weight", Turned(turn, columns=True))
    return changed(checkpoint, changes.made, config=folding.config)


def _rotate_residual(residual: Residual, changes: _Changes, generator: torch.Generator) -> None:
    turn = random_rotation(residual.width, generator)
    for table in residual.tables:
        changes.add(table, "weight", Turned(turn, columns=True))
    for writer in residual.writers:
        for leaf in ("weight", "bias"):
            changes.add(writer, leaf, Turned(turn))
    for reader, through in residual.readers.items():
        if through is not None:
            gain = residual.norms[through].offset + changes.value(through, "weight")
            changes.add(reader, "weight", Scaled(gain, columns=True))
        changes.add(reader, "weight", Turned(turn, columns=True))
    for path, norm in residual.norms.items():
        changes.add(path, "weight", Scaled(torch.zeros(norm.width)), Moved(1 - norm.offset))


def scaled(folding: Folding, checkpoint: Checkpoint, scales: Sequence[tuple[Fold, Tensor]]) -> Checkpoint:
    """The checkpoint with inputs divided by scales [of the producer's output], and columns multiplied by them.

    checkpoint: with its heads untied already. What a norm's weight becomes is rounded to its type first, and the
    columns take what the rounded weight really divides by: nothing is lost where the scales lie.
    """
    changes = _Changes(checkpoint, Folding(folding.config))
    for fold, wanted in scales:
        scale = wanted.float().cpu()
        if fold.norm is None:
            for leaf in ("weight", "bias"):
                changes.add(fold.producer, leaf, Scaled(1 / scale))
        else:
            scale = _exact(fold, scale, changes)
            offset = fold.norm.offset
            steps = (Moved(offset), Scaled(1 / scale), Moved(-offset)) if offset else (Scaled(1 / scale),)
            changes.add(fold.producer, "weight", *steps)
            changes.add(fold.producer, "bias", Scaled(1 / scale))
        for linear in fold.linears:
            changes.add(linear, "weight", Scaled(fold.spread(scale), columns=True))
    return changed(checkpoint, changes.made)


def _exact(fold: Fold, scale: Tensor, changes: _Changes) -> Tensor:
    """The scales nearest to those wanted by which a norm's weight can be divided in the type that it is stored in."""
    assert fold.norm is not None
    gain = fold.norm.offset + changes.value(fold.producer, "weight")
    stored = (gain / scale - fold.norm.offset).to(changes.dtype(fold.producer, "weight")).float()
    divided = fold.norm.offset + stored
    return torch.where((divided != 0) & (gain != 0), gain / divided, scale)


def require_same(view: Checkpoint, original: Checkpoint, *, seed: int, device: torch.device) -> float:
    """The relative difference of what both give for a window of tokens, in fp32. Raises ModelzipError for a large
    one."""
    with torch.no_grad():
        made, wanted = (probe(one, seed=seed, device=device)[1]().double() for one in (unrounded(view), original))
    off = float((made - wanted).norm() / wanted.norm().clamp(min=1e-30))
    if not off <= SAME:
        raise ModelzipError(
            f"{original.source} isn't the same function once neighbouring weights are changed together (its output "
            f"differs by {off:.2g}): modelzip doesn't know this architecture well enough; take --rotate none, or "
            "another --method."
        )
    return off


def write_changes(view: Checkpoint, structure: Structure, *, claimed: Iterable[str], writer: CheckpointWriter) -> None:
    """Put on disk what is made as it is read and no compressed module takes the place of, by block or by module."""
    taken = set(claimed)
    parts: dict[str, list[str]] = {}
    original = view.original if isinstance(view, ChangedCheckpoint) else view
    for name in view.made_names:
        if name not in taken:
            place = next((one.name for one in structure.blocks if name.startswith(f"{one.name}.")), None)
            parts.setdefault(f"changed {place or name}", []).append(name)
    for part, names in parts.items():
        if part not in writer.done:
            replaces = [name for name in names if name in original.tensors]
            writer.write_part(part, view.read(names), replaces=replaces, record={"modules": {}})
