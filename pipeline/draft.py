"""Speculative decoding: a compressed model writes ahead, and the original checks several tokens in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.recipes.schema import Evaluation

from .bench import Bench
from .calibrate import longest
from .clock import device_clock
from .data_kind import writes
from .opened import open_by_transformers
from .speed import check_room
from .tokens import same_tokens, vocabulary_size

PROMPTS: Final = 8
"""Texts that are gone on with, after one that isn't counted."""


@dataclass
class Passes:
    """Forward passes of a model."""

    count: int = 0

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """Count them while the body runs."""
        hook = model.register_forward_pre_hook(self._one)
        try:
            yield
        finally:
            hook.remove()

    def _one(self, *_: Any) -> None:
        self.count += 1


@dataclass
class Found:
    """Of each counted text: seconds without and with the draft, whether the tokens were the same, and all passes."""

    plain: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    tokens: int = 0
    checks: Passes = field(default_factory=Passes)
    guesses: Passes = field(default_factory=Passes)


def check_draft(model: Checkpoint, draft: Checkpoint, evaluation: Evaluation, *, said: str) -> None:
    """Raise RecipeError if the draft can't write ahead for the model. said: how the user asked for it."""
    for one in (model, draft):
        if not writes(one.config):
            named = ", ".join(one.config.get("architectures") or ()) or "of no named architecture"
            raise RecipeError(f"{said}: {one.source} is {named}, which writes no text: name two that do.")
        check_room(one, evaluation)
    if not same_tokens(model, draft):
        sizes = [vocabulary_size(one.config) for one in (draft, model)]
        raise RecipeError(
            f"{said}: {draft.source} has {sizes[0]} tokens and {model.source} has {sizes[1]}: name a draft that was "
            "made from it."
        )


def draft_section(
    model: Checkpoint,
    draft: Checkpoint,
    windows: Tensor,
    evaluation: Evaluation,
    bench: Bench,
) -> dict[str, Any]:
    """The report's `speculative`: greedy writing with and without the draft, in turns. Gradients must be off.

    Leviathan et al. 2022, "Fast Inference from Transformers via Speculative Decoding", by transformers' own assisted
    generation, with as many guesses at a time as its defaults say.
    """
    target, helper = (open_by_transformers(one, bench.device, dtype=bench.dtype) for one in (model, draft))
    room = min(longest(one) for one in (target, helper)) - evaluation.new_tokens
    prompts = windows[:, : min(windows.shape[1], room)].to(bench.device)
    found, clock = Found(), device_clock(bench.device)
    for number in range(PROMPTS + 1):
        bench.progress.step("write", number, PROMPTS + 1, "with and without the draft")
        prompt = prompts[number % len(prompts)].unsqueeze(0)
        _one_text(target, helper, prompt, evaluation.new_tokens, found, clock, counts=number > 0, first=number % 2)
    bench.progress.step("write", PROMPTS + 1, PROMPTS + 1)
    return {
        "draft": draft.source,
        "texts": PROMPTS,
        "prompt_tokens": prompts.shape[1],
        "new_tokens": evaluation.new_tokens,
        "acceptance": (found.tokens - found.checks.count) / max(found.guesses.count, 1),
        "tokens_per_pass": found.tokens / found.checks.count,
        "identical": sum(found.same),
        "plain_ms": 1e3 * median(found.plain) / evaluation.new_tokens,
        "drafted_ms": 1e3 * median(found.drafted) / evaluation.new_tokens,
        "speedup": median(one / other for one, other in zip(found.plain, found.drafted, strict=True)),
    }


def _one_text(
    target: Any,
    helper: Any,
    prompt: Tensor,
    count: int,
    found: Found,
    clock: Callable[[], float],
    *,
    counts: bool,
    first: int,
) -> None:
    """Go on with a text both ways; `first` says which comes first, so that neither always finds the caches warm."""
    checks, guesses = (found.checks, found.guesses) if counts else (Passes(), Passes())
    made: dict[bool, Tensor] = {}
    seconds: dict[bool, float] = {}
    for drafted in (bool(first), not first):
        begin = clock()
        if drafted:
            with checks.of(target), guesses.of(helper):
                made[drafted] = continued(target, prompt, count, helper=helper)
        else:
            made[drafted] = continued(target, prompt, count)
        seconds[drafted] = clock() - begin
    if counts:
        found.plain.append(seconds[False])
        found.drafted.append(seconds[True])
        found.same.append(torch.equal(made[False], made[True]))
        found.tokens += made[True].shape[1] - prompt.shape[1]


def continued(target: Any, prompt: Tensor, count: int, *, helper: Any = None) -> Tensor:
    """The prompt [1, length] and `count` more tokens, the likeliest each, whatever they are."""
    made: Tensor = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        assistant_model=helper,
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
    )
    return made
