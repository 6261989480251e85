"""Models with all their weights in memory, as users open them and as they are measured."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from modelzip.checkpoints.blocks import Structure
from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.loaded import load_whole
from modelzip.checkpoints.skeleton import skeleton

from .calibrate import forward_inputs


def open_by_transformers(checkpoint: Checkpoint, device: torch.device, *, dtype: torch.dtype | str) -> Any:
    """The model as a user opens it, with modelzip's own layouts, in eval mode. dtype: of torch, or auto.

    It has run on one token, before which some layouts aren't what they will be. Raises CheckpointError if transformers
    can't open it.
    """
    import modelzip.weights  # noqa: F401  # teaches its layouts to transformers

    kind = type(skeleton(checkpoint))
    try:
        with redirect_stderr(StringIO()), torch.no_grad():  # bars of compressed-tensors'
            model: Any = kind.from_pretrained(checkpoint.folder, dtype=dtype)
            model = model.to(device).eval()
            config = model.config.get_text_config()
            end = getattr(config, "eos_token_id", None)  # which T5's classifiers look for
            token = end if isinstance(end, int) and end < config.vocab_size else 0
            model(**forward_inputs(model)(torch.full((1, 1), token, dtype=torch.int64, device=device)))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        told = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise CheckpointError(f"transformers can't open {checkpoint.source}: {told}.") from None
    return model


class WholeModel:
    """A model of our own kind where others are streamed: the same `model`, `device` and `outputs`, and no blocks."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.structure = Structure((), (), (), ())
        self.model = load_whole(checkpoint, dtype=dtype, device=device)

    def outputs(self, batches: Sequence[Mapping[str, Tensor]]) -> Generator[Any, None, None]:
        """The forward's output for each batch, one in memory at a time."""
        for batch in batches:
            yield self.model(**{name: tensor.to(self.device) for name, tensor in batch.items()})
