"""The second moments of what flows into linears, summed while all batches run through a block as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelzip.checkpoints.blocks import Block
from modelzip.checkpoints.streamed import StreamedModel
from modelzip.checkpoints.walk import Walk

from .hessian import accumulate


@dataclass
class InputSum:
    """Of one input x over the tokens so far: the sum of x xᵀ under its diagonal, [in, in], or that of x², [in]."""

    total: Tensor
    tokens: int = 0


def sums_of_inputs(
    streamed: StreamedModel, walk: Walk, block: Block, linears: Mapping[str, bool], batches: Iterable[int] | None = None
) -> dict[str, InputSum]:
    """Let all batches that wait at a loaded block run through it, and sum what flows into these linears of it.

    batches: numbers of those that are let run, None for all. linears: by module name, whether the sum is of x xᵀ, not
    of its diagonal alone. Those that are handed the same tensor get one and the same sum. A linear that no token
    reaches isn't in the result.
    """
    found: dict[str, InputSum] = {}
    with _watched(streamed, linears, found) as next_batch:
        for batch in range(len(walk)) if batches is None else batches:
            if walk.at[batch].module == block.name:
                next_batch()
                walk.advance(batch)
    streamed.free_outside()
    return found


@contextmanager
def _watched(
    streamed: StreamedModel, linears: Mapping[str, bool], found: dict[str, InputSum]
) -> Iterator[Callable[[], None]]:
    """Hooks that sum into `found`; gives what must be called before each batch."""
    seen: list[tuple[Tensor, InputSum]] = []  # of this batch: kept, so that no other tensor gets its identity

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            width = x.shape[-1]
            shape = (width, width) if linears[name] else (width,)
            twin = next((sums for tensor, sums in seen if tensor is x and sums.total.shape == shape), None)
            if twin is not None and found.setdefault(name, twin) is twin:
                return
            sums = found.setdefault(name, InputSum(torch.zeros(shape, dtype=torch.float32, device=x.device)))
            sums.tokens += accumulate(sums.total, x)
            seen.append((x, sums))

        return hook

    handles = [streamed.linear(name).register_forward_pre_hook(watch(name)) for name in linears]
    try:
        yield seen.clear
    finally:
        seen.clear()
        for handle in handles:
            handle.remove()
