"""The scales of what a model caches: one more pass of the calibration text, through the compressed model.

What is cached is what the compressed projections put out, so the blocks are those that were written, inputs of linears
rounded if that is what they do. Keys and values are not rounded in this pass: a layer's are those that it has with the
ones before it as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from modelzip.checkpoints.blocks import Block
from modelzip.checkpoints.streamed import StreamedModel, start
from modelzip.checkpoints.walk import Walk
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.compressors.quantize.cache_scales import Sizes, cache_scales, squared_error, squares
from modelzip.evaluation.cache_report import CACHE
from modelzip.weights.kv_cache import K_SCALE, V_SCALE, Change, change_cached

from .cache_plan import CachePlan
from .earlier import restore, restore_shared
from .layerwise import Job
from .progress import Progress

PART: Final = CACHE
"""Name of the part that the scales are written as."""


class _Seen:
    """Keys and values that went by in a block: their sizes by module, and how often they came."""

    def __init__(self, heads: Mapping[str, int]) -> None:
        self.keys = {name: Sizes.none(count) for name, count in heads.items()}
        self.values = dict(self.keys)
        self.calls = 0
        self.tokens = 0

    def watcher(self, name: str) -> Change:
        """A change that changes nothing."""

        def watch(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            self.keys[name] = self.keys[name].and_of(_by_head(keys))
            self.values[name] = self.values[name].and_of(_by_head(values))
            self.calls += 1
            self.tokens += keys.shape[0] * keys.shape[2]
            return keys, values

        return watch


def _by_head(x: Tensor) -> Tensor:
    """[batch, heads, tokens, dim] -> [heads, numbers]."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


@dataclass
class _Found:
    """Of the blocks so far. tensors: the scales, by name. off, whole: the sums of the squares of what rounding changes,
    and of all that is cached, by side."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    off: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def add(self, plan: CachePlan, seen: _Seen) -> None:
        """Choose the scales of a block."""
        for side, leaf, by_module in (("keys", K_SCALE, seen.keys), ("values", V_SCALE, seen.values)):
            for name, by_head in by_module.items():
                sizes = by_head if plan.scheme.strategy == "attn_head" else by_head.joined()
                scales = cache_scales(sizes, plan.scheme).to(plan.dtype)
                self.tensors[plan.stems[name] + leaf] = scales.reshape(plan.scheme.shape(plan.scales[name]))
                off = float(squared_error(sizes, scales.double(), plan.scheme).sum())
                self.off[side] = self.off.get(side, 0.0) + off
                self.whole[side] = self.whole.get(side, 0.0) + float(squares(sizes).sum())
        self.tokens += seen.tokens

    def record(self, plan: CachePlan) -> dict[str, Any]:
        """What the report says."""
        before, after = plan.bytes_per_token
        errors = {side: (self.off[side] / whole) ** 0.5 if whole else 0.0 for side, whole in self.whole.items()}
        return {
            "codes": plan.scheme.codes,
            "bits": plan.scheme.bits,
            "bits_before": plan.full_bits,
            "scales": "layer" if plan.scheme.strategy == "tensor" else "head",
            "layers": len(plan.scales),
            "bytes_per_token": after,
            "bytes_per_token_before": before,
            "tokens": self.tokens // len(plan.scales),
            "error_of_keys": errors["keys"],
            "error_of_values": errors["values"],
        }


def write_scales(
    plan: CachePlan,
    job: Job,
    streamed: StreamedModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    writer: CheckpointWriter,
    progress: Progress,
) -> None:
    """Find the scales on the text and write them as a part, with what the report says of them. All blocks of the stage
    are written already. Gradients must be off. Nothing is done where an earlier run has written the part."""
    if PART in writer.done:
        return
    found = _Found()
    blocks = streamed.structure.blocks
    inside = [{name: plan.heads[name] for name in plan.heads if name.startswith(f"{one.name}.")} for one in blocks]
    last = max(number for number, heads in enumerate(inside) if heads)
    walk = streamed.walk(batches, spill_limit=job.spill_limit, spill_folder=job.spill_folder)
    try:
        start(walk, streamed)
        for number, block in enumerate(blocks[: last + 1]):
            progress.step("cache", number, len(blocks), block.name)
            _load(job, streamed, block, writer)
            if number == last:  # what comes after its attention isn't needed
                walk.stop_at(linear.name for linear in block.linears)
            seen = _Seen(inside[number])
            _run(streamed, walk, block, seen, is_last=number == last)
            found.add(plan, seen)
            streamed.free(block)
        progress.step("cache", len(blocks), len(blocks))
    finally:
        walk.close()
    writer.write_part(PART, found.tensors, replaces=(), record={"modules": {}, CACHE: found.record(plan)})


def _load(job: Job, streamed: StreamedModel, block: Block, writer: CheckpointWriter) -> None:
    """The block with the weights that were written."""
    streamed.load(block)
    restore_shared(streamed, block, job.targets, writer)
    if block.name in writer.done:
        plans = [job.targets[linear.name] for linear in block.linears if linear.name in job.targets]
        restore(streamed, block, plans, writer)


def _run(streamed: StreamedModel, walk: Walk, block: Block, seen: _Seen, *, is_last: bool) -> None:
    """Let all batches through the block, of the last one only until its keys and values were seen."""
    handles = [change_cached(streamed.model.get_submodule(name), seen.watcher(name)) for name in seen.keys]
    for batch in range(len(walk)):
        wanted = seen.calls + len(seen.keys)
        while (here := walk.at[batch].module) is not None and f"{here}.".startswith(f"{block.name}."):
            if is_last and seen.calls >= wanted:
                walk.leave(batch)
            else:
                walk.advance(batch)
    streamed.free_outside()
    for handle in handles:
        if handle is not None:
            handle.remove()
