"""Texts that both models go on with, to be read side by side: what no figure shows."""

from __future__ import annotations

from typing import Any, Final

import psutil
import torch
from torch import Tensor

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.recipes.schema import Evaluation

from .calibrate import has_tokenizer, longest, tokenizer_of
from .data_kind import writes
from .draft import continued
from .measure import dense_bytes
from .opened import open_by_transformers
from .progress import Progress

PROMPT_TOKENS: Final = 32
"""Tokens of a text that are read."""


def sample_texts(
    compressed: Checkpoint,
    original: Checkpoint | None,
    windows: Tensor,
    evaluation: Evaluation,
    *,
    dtype: str,
    device: torch.device,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The report's `samples`: beginnings of windows, int64 [any, seq_len], and what each model writes after them, the
    likeliest token each time. Gradients must be off.

    One model is in memory at a time. Empty for models that write no text or have no tokenizer, and, told, where there
    is no room.
    """
    sources = [compressed] if original is None else [compressed, original]
    if not evaluation.samples or not writes(compressed.config) or not has_tokenizer(compressed):
        return []
    if (need := 1.5 * max(map(dense_bytes, sources))) > psutil.virtual_memory().available:
        progress.say(f"no sample texts: a whole model in memory takes {need / 1e9:,.1f} GB")
        return []
    tokenizer = tokenizer_of(compressed)
    rows = torch.linspace(0, len(windows) - 1, min(evaluation.samples, len(windows))).long()
    written: list[list[Tensor]] = []
    for source in sources:
        try:
            model = open_by_transformers(source, device, dtype=dtype)
        except CheckpointError as error:
            progress.say(f"no sample texts: {error}")
            return []
        room = min(PROMPT_TOKENS, windows.shape[1], longest(model) - evaluation.new_tokens)
        if room < 1:
            return []
        prompts = windows[rows, :room]
        texts = []
        for number, prompt in enumerate(prompts):
            progress.step("sample texts", number, len(prompts))
            texts.append(continued(model, prompt[None].to(device), evaluation.new_tokens)[0, room:].cpu())
        written.append(texts)
        del model
    progress.step("sample texts", len(prompts), len(prompts))
    return [
        _side_by_side(tokenizer, prompt, *(texts[number] for texts in written)) for number, prompt in enumerate(prompts)
    ]


def _side_by_side(tokenizer: Any, prompt: Tensor, compressed: Tensor, original: Tensor | None = None) -> dict[str, Any]:
    def text(tokens: Tensor) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    same = None if original is None else int((compressed == original).long().cumprod(0).sum())
    return {
        "prompt": text(prompt),
        "original": None if original is None else text(original),
        "compressed": text(compressed),
        "tokens": len(compressed),
        "same_tokens": same,
    }
