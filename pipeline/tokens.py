"""Models whose tokens aren't the original's any more, because a stage has changed the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from modelzip.checkpoints.errors import CalibrationError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton

from .calibrate import calibration_windows, is_causal, tokenizer_of
from .context import Context
from .text import Windows, read_windows


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """How many tokens a config.json says that a model has; None if it doesn't say."""
    size = {**config, **config.get("text_config", {})}.get("vocab_size")
    return size if isinstance(size, int) else None


def same_tokens(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether both models' token ids can mean the same."""
    sizes = {vocabulary_size(one.config), vocabulary_size(other.config)} - {None}
    return len(sizes) < 2


def is_retokenized(planned: Checkpoint) -> bool:
    """Whether a planned result will have other tokens than the tokenizer that lies in its folder now."""
    return vocabulary_size(planned.config) != vocabulary_size(Checkpoint.open(str(planned.folder)).config)


def windows_for(source: Checkpoint, windows: Windows, *, original: Checkpoint, context: Context) -> Windows:
    """The calibration text, which was cut for the original, in the token ids of what a stage starts from.

    A file is read again by the new tokenizer; what the original wrote itself is spelled out and tokenized again; even
    draws are drawn again. Raises CalibrationError if that leaves no window.
    """
    if same_tokens(source, original):
        return windows
    recipe = context.recipe
    calibration = recipe.calibration
    if calibration.source != "self":
        return read_windows(
            calibration.source,
            tokenizer_of(source),
            field=calibration.field,
            split=calibration.split,
            count=len(windows.tokens),
            seq_len=calibration.seq_len,
            least=1,
        )
    model = skeleton(source)
    if is_causal(model):
        return _spelled_again(windows, tokenizer_of(original), tokenizer_of(source))
    drawn, _ = calibration_windows(
        calibration,
        source,
        model,
        seed=recipe.seed,
        needed=True,
        held_back=0,
        device=context.device,
        progress=context.progress,
    )
    assert drawn is not None
    return drawn


def _spelled_again(windows: Windows, before: Any, after: Any) -> Windows:
    """Windows as long as these of the same text, as many as it fills, but no more than there were."""
    count, seq_len = windows.tokens.shape
    texts = before.batch_decode(windows.tokens, clean_up_tokenization_spaces=False)
    encoded = after("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    filled = min(count, len(encoded) // seq_len)
    if filled == 0:
        raise CalibrationError(
            f"The text that the model wrote itself is {len(encoded)} tokens in its new vocabulary, less than a window "
            f"of {seq_len}: give --calibration FILE."
        )
    tokens = torch.tensor(encoded[: filled * seq_len], dtype=torch.int64).view(filled, seq_len)
    return Windows(tokens, f"{windows.source}, tokenized again")
