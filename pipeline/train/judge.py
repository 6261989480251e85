"""A teacher, opened so that it reads what its student reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint

from ..calibrate import tokenizer_of
from .opening import open_whole


class Translated(nn.Module):
    """A model of whole texts that is given another tokenizer's ids. ids: its own for each of these, int64 [tokens]."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        super().__init__()
        self.model = model
        self.ids: Tensor
        self.register_buffer("ids", ids, persistent=False)

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.ids.device

    def forward(self, input_ids: Tensor, **rest: Any) -> Any:
        """What the model says of the same tokens. input_ids: int64 [batch, length]."""
        return self.model(input_ids=self.ids[input_ids], **rest)


def open_teacher(teacher: Checkpoint, origin: Checkpoint, *, attention: str | None = None) -> Any:
    """The teacher in fp32, in eval mode, without gradients, for texts in the tokens of `origin`.

    Where a vocabulary was pruned, `origin` numbers its tokens anew. Raises CheckpointError if the teacher lacks one.
    """
    model = open_whole(teacher, attention=attention)
    ids = translation(origin, teacher)
    return model if ids is None else Translated(model, ids).eval()


def translation(origin: Checkpoint, teacher: Checkpoint) -> Tensor | None:
    """For each of the origin's tokens the teacher's id, int64 [tokens]; None where all are the same.

    Raises CheckpointError if the teacher lacks one.
    """
    if teacher.folder == origin.folder:
        return None
    mine, theirs = (tokenizer_of(one).get_vocab() for one in (origin, teacher))
    if mine == theirs:
        return None
    missing = mine.keys() - theirs.keys()
    if missing:
        raise CheckpointError(f"The teacher {teacher.source} doesn't know the token {min(missing)!r} of its student.")
    ids = torch.zeros(max(mine.values()) + 1, dtype=torch.int64)
    for token, place in mine.items():
        ids[place] = theirs[token]
    return ids
