"""Which component of a transformer each of its modules belongs to."""

from __future__ import annotations

import re
from typing import Final

from torch import nn
from transformers.pytorch_utils import Conv1D

from modelzip.checkpoints.blocks import find_structure, is_own
from modelzip.checkpoints.index import Checkpoint

EMBEDDING, PROJECTIONS, MATRIX = "embedding", "attention projections", "attention matrix"
FEED_FORWARD, HEAD, REST = "feed-forward", "head", "norms and others"
COMPONENTS: Final = (EMBEDDING, PROJECTIONS, MATRIX, FEED_FORWARD, HEAD, REST)
ATTENTION: Final = re.compile(r"att(entio)?n", re.IGNORECASE)
"""What every model of transformers calls its attention, in the path of a module inside a block."""


class Parts:
    """Which component each module of a model belongs to. model: the checkpoint's skeleton."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        structure = None if is_own(checkpoint) else find_structure(model, checkpoint)
        self._blocks = () if structure is None else tuple(f"{block.name}." for block in structure.blocks)
        self._modules = dict(model.named_modules())

    def of(self, path: str) -> str:
        """The component of a module, by what it is and where it lies."""
        module = self._modules[path]
        inside = self._inside(path)
        if isinstance(module, nn.Embedding) and (inside is None or not ATTENTION.search(inside)):
            return EMBEDDING
        is_matrix = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        if inside is None:
            return HEAD if isinstance(module, nn.Linear | Conv1D) else REST
        if ATTENTION.search(inside):
            return PROJECTIONS if is_matrix else REST if any(True for _ in module.parameters()) else MATRIX
        return FEED_FORWARD if is_matrix else REST

    def computing(self, path: str) -> str:
        """The component of what a module computes itself, outside of the modules in it.

        One that the skeleton hasn't got, such as a part of a compressed linear, belongs to the one around it.
        """
        while path not in self._modules:
            path = path.rpartition(".")[0]
        inside = self._inside(path)
        has_own = any(True for _ in self._modules[path].parameters(recurse=False))
        if has_own or inside is None:
            return self.of(path)
        return MATRIX if ATTENTION.search(inside) else FEED_FORWARD

    def _inside(self, path: str) -> str | None:
        """Its path in the block that it lies in; None outside of the blocks."""
        return next((path.removeprefix(block) for block in self._blocks if path.startswith(block)), None)
