"""How fast language models read and write: both opened as a user opens them, and timed in turns in one process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.evaluation.energy import meter
from modelzip.recipes.schema import Evaluation

from .bench import Bench
from .calibrate import longest
from .clock import device_clock
from .latency import spread
from .opened import open_by_transformers
from .resident import resident

REPETITIONS: Final = 5
BATCHES: Final = 3
"""Times that a text is read and gone on with, and that a batch is read, each after one that isn't counted."""


@dataclass
class Timed:
    """One model's side. prefill: seconds of each prompt; tokens: of each token written, a list a prompt; batches:
    seconds of each repetition by batch size. joules: of all prompts, None where the machine doesn't tell."""

    model: Any
    prefill: list[float] = field(default_factory=list)
    tokens: list[list[float]] = field(default_factory=list)
    batches: dict[int, list[float]] = field(default_factory=dict)
    joules: float | None = None


def check_room(checkpoint: Checkpoint, evaluation: Evaluation) -> None:
    """Raise RecipeError if the model takes no more tokens than it is to write."""
    if (limit := longest(skeleton(checkpoint))) <= evaluation.new_tokens:
        raise RecipeError(
            f"evaluate.new_tokens is {evaluation.new_tokens}, and {checkpoint.source} takes at most {limit} tokens, "
            "those that it reads among them: lower it."
        )


def speed_section(
    compressed: Checkpoint,
    original: Checkpoint | None,
    windows: Tensor,
    evaluation: Evaluation,
    bench: Bench,
) -> dict[str, Any]:
    """The report's `speed`. windows: int64 [any, seq_len], whose beginnings are the prompts. Gradients must be off."""
    sources = [compressed] if original is None else [original, compressed]
    sides = [Timed(open_by_transformers(one, bench.device, dtype=bench.dtype)) for one in sources]
    length = min(windows.shape[1], *(longest(side.model) - evaluation.new_tokens for side in sides))
    prompts = windows[:, :length].to(bench.device)
    joules, clock = meter(bench.device.type), device_clock(bench.device)
    for repetition in range(REPETITIONS + 1):
        bench.progress.step("time", repetition, REPETITIONS + 1, "reading and writing")
        prompt = prompts[repetition % len(prompts)].unsqueeze(0)
        for side in _in_turn(sides, repetition):
            before = None if joules is None else joules()
            prefill, tokens = written(side.model, prompt, evaluation.new_tokens, clock)
            if repetition:  # the first one warms up
                side.prefill.append(prefill)
                side.tokens.append(tokens)
                if joules is not None and before is not None:
                    side.joules = (side.joules or 0.0) + joules() - before
    for size in evaluation.batch_sizes:
        _time_batches(sides, prompts, size, clock)
    bench.progress.step("time", REPETITIONS + 1, REPETITIONS + 1)
    count = REPETITIONS * evaluation.new_tokens
    return {
        "prompt_tokens": length,
        "new_tokens": evaluation.new_tokens,
        "repetitions": REPETITIONS,
        "prefill": _times([[[one] for one in side.prefill] for side in sides]),
        "token": _times([side.tokens for side in sides]),
        "throughput": [_throughput(sides, size, length) for size in evaluation.batch_sizes],
        "memory": _memory(sources, tokens=length, dtype=bench.dtype),
        "energy": _paired([None if side.joules is None else side.joules / count for side in sides], "joules"),
    }


def written(model: Any, prompt: Tensor, count: int, clock: Callable[[], float]) -> tuple[float, list[float]]:
    """Seconds until the first token after a prompt [1, length] is there, and of each of `count` more; greedily."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    begin = clock()
    said = model(input_ids=prompt, use_cache=True, **last)
    token = said.logits[:, -1:].argmax(-1)
    now = clock()
    prefill, seconds = now - begin, []
    for _ in range(count):
        begin = now
        said = model(input_ids=token, past_key_values=said.past_key_values, use_cache=True)
        token = said.logits[:, -1:].argmax(-1)
        now = clock()
        seconds.append(now - begin)
    return prefill, seconds


def _time_batches(sides: Sequence[Timed], prompts: Tensor, size: int, clock: Callable[[], float]) -> None:
    batch = prompts[torch.arange(size) % len(prompts)]
    for repetition in range(BATCHES + 1):
        for side in _in_turn(sides, repetition):
            begin = clock()
            side.model(input_ids=batch, use_cache=False)
            if repetition:
                side.batches.setdefault(size, []).append(clock() - begin)


def _in_turn(sides: Sequence[Timed], repetition: int) -> Sequence[Timed]:
    """Neither is always the one that finds the caches warm."""
    return sides if repetition % 2 else sides[::-1]


def _times(sides: list[list[list[float]]]) -> dict[str, Any]:
    """Percentiles over all of each side's times, and how many times faster the last side is than the first."""
    found = [spread([seconds for repetition in side for seconds in repetition]) for side in sides]
    ratios = [median(one) / median(other) for one, other in zip(sides[0], sides[-1], strict=True)]
    return {
        "original": found[0] if len(sides) > 1 else None,
        "compressed": found[-1],
        "speedup": median(ratios) if len(sides) > 1 else None,
    }


def _throughput(sides: Sequence[Timed], size: int, length: int) -> dict[str, Any]:
    """Tokens read a second in batches of a size."""
    rates = [size * length / median(side.batches[size]) for side in sides]
    ratios = [one / other for one, other in zip(sides[0].batches[size], sides[-1].batches[size], strict=True)]
    return {
        "batch_size": size,
        "original": rates[0] if len(sides) > 1 else None,
        "compressed": rates[-1],
        "speedup": median(ratios) if len(sides) > 1 else None,
    }


def _memory(sources: Sequence[Checkpoint], *, tokens: int, dtype: str) -> dict[str, float | None] | None:
    found = [resident(one, tokens=tokens, dtype=dtype) for one in sources]
    parts = [_paired([None if one is None else one[key] for one in found], key) for key in ("rest_mb", "peak_mb")]
    return None if None in parts else {key: value for part in parts if part for key, value in part.items()}


def _paired(values: Sequence[float | None], name: str) -> dict[str, float | None] | None:
    """One figure of both sides; None where the last side's isn't known."""
    if values[-1] is None:
        return None
    return {f"original_{name}": values[0] if len(values) > 1 else None, f"compressed_{name}": values[-1]}
