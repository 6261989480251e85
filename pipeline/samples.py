"""Texts that both models go on with, to be read side by side: what no figure shows."""

from __future__ import annotations

from typing import Any, Final

import psutil
import torch
from torch import Tensor

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.recipes.schema import Evaluation

from .bench import Bench
from .calibrate import has_tokenizer, longest, tokenizer_of
from .data_kind import writes
from .draft import continued
from .measure import dense_bytes
from .opened import open_by_transformers

PROMPT_TOKENS: Final = 32
"""Tokens of a text that are read."""


def sample_texts(
    compressed: Checkpoint,
    original: Checkpoint | None,
    windows: Tensor,
    evaluation: Evaluation,
    bench: Bench,
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
        bench.progress.say(f"no sample texts: a whole model in memory takes {need / 1e9:,.1f} GB")
        return []
    read = min(PROMPT_TOKENS, windows.shape[1], *(longest(skeleton(one)) - evaluation.new_tokens for one in sources))
    if read < 1:
        bench.progress.say(f"no sample texts: the model takes no more than the {evaluation.new_tokens} new tokens")
        return []
    rows = torch.linspace(0, len(windows) - 1, min(evaluation.samples, len(windows))).long()
    prompts = windows[rows, :read]
    try:
        written = [_written(source, prompts, evaluation.new_tokens, bench) for source in sources]
    except CheckpointError as error:
        bench.progress.say(f"no sample texts: {error}")
        return []
    tokenizer = tokenizer_of(compressed)
    return [
        _side_by_side(tokenizer, prompt, *(texts[number] for texts in written)) for number, prompt in enumerate(prompts)
    ]


def _written(source: Checkpoint, prompts: Tensor, count: int, bench: Bench) -> list[Tensor]:
    """The `count` tokens that a model writes after each prompt [any, length]."""
    model = open_by_transformers(source, bench.device, dtype=bench.dtype)
    texts = []
    for number, prompt in enumerate(prompts):
        bench.progress.step("sample texts", number, len(prompts), source.source)
        texts.append(continued(model, prompt[None].to(bench.device), count)[0, len(prompt) :].cpu())
    bench.progress.step("sample texts", len(prompts), len(prompts))
    return texts


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
