"""The layer-wise engine: block after block, linear after linear, each on what the compressed model feeds it.

Calibration batches wait in front of a linear (see `checkpoints.walk`); the engine sums their Hessian, compresses the
weight, exchanges it, and lets them go on to the next linear. So every linear is compressed for the inputs that it will
really see, also inside a block, and the whole costs one forward pass. Linears that are handed the same tensor (q, k, v;
gate, up) share the Hessian and what the method prepares from it, and one stop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelzip.checkpoints.blocks import Block, Linear
from modelzip.checkpoints.errors import CheckpointError, ModelzipError
from modelzip.checkpoints.index import DTYPES
from modelzip.checkpoints.streamed import StreamedModel, start
from modelzip.checkpoints.walk import Walk
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.compressors.quantize.gptq import SingularHessianError
from modelzip.compressors.quantize.methods import METHODS, LayerMethod
from modelzip.compressors.quantize.settings import QuantizeSettings, Rtn
from modelzip.weights.affine import Affine

from .clock import Clock
from .hessian import accumulate, finish, relative_error
from .progress import Progress

MOST_FALLBACKS = 0.1
"""Share of modules that may fall back to rounding; more is an error, since that isn't the method asked for."""


@dataclass(frozen=True)
class Job:
    """What the engine is to do. targets: the settings of each linear to be compressed, by module name."""

    targets: Mapping[str, QuantizeSettings]
    propagate: str
    spill_limit: int
    spill_folder: Path | None


@dataclass
class _Shared:
    """The Hessian of one input tensor and what methods prepared from it, for the linears it is handed to."""

    hessian: Tensor
    tokens: int
    prepared: dict[QuantizeSettings, Any] = field(default_factory=dict)


def compress_blocks(
    job: Job,
    streamed: StreamedModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    writer: CheckpointWriter,
    clock: Clock,
    progress: Progress,
) -> None:
    """Compress every target and write each block as a part, with a record for each module.

    Without batches (methods that need no data) blocks are only read, compressed and written. Blocks that the writer
    has already are not compressed again: the batches run through them as they were written. Gradients must be off.
    Raises CheckpointError for weights that aren't finite, ModelzipError if too many modules had to fall back.
    """
    blocks = streamed.structure.blocks
    walk = streamed.walk(batches, spill_limit=job.spill_limit, spill_folder=job.spill_folder)
    try:
        begin = time.perf_counter()
        start(walk, streamed)
        clock.add("forward", begin)
        last = max((i for i, block in enumerate(blocks) if _wanted(block, job)), default=-1)
        for number, block in enumerate(blocks[: last + 1]):
            progress.step("quantize", number, len(blocks), block.name)
            _one_block(job, streamed, block, walk=walk, writer=writer, clock=clock, is_last=number == last)
        progress.step("quantize", len(blocks), len(blocks))
    finally:
        walk.close()
    _check_fallbacks(job, writer)


def _wanted(block: Block, job: Job) -> list[Linear]:
    return [linear for linear in block.linears if linear.name in job.targets]


def _one_block(
    job: Job,
    streamed: StreamedModel,
    block: Block,
    *,
    walk: Walk,
    writer: CheckpointWriter,
    clock: Clock,
    is_last: bool,
) -> None:
    wanted = _wanted(block, job)
    begin = time.perf_counter()
    if is_last and (not wanted or block.name in writer.done):
        return
    streamed.load(block)
    clock.add("read", begin)
    if block.name in writer.done:
        if job.propagate == "compressed":
            _restore(streamed, wanted, writer.read_part(block.name), writer.done[block.name])
    elif wanted:
        work = _BlockWork(job, streamed, walk, clock)
        work.run(block, wanted)
        begin = time.perf_counter()
        names = {linear.name: linear.tensor.removesuffix("weight") for linear in wanted}
        tensors = {names[m] + suffix: t for m, w in work.done.items() for suffix, t in w.tensors().items()}
        record = {"modules": {linear.name: work.records[linear.name] for linear in wanted}}
        writer.write_part(block.name, tensors, replaces=[linear.tensor for linear in wanted], record=record)
        clock.add("write", begin)
    if not is_last:
        begin = time.perf_counter()
        _run_on(walk, block)
        streamed.free_outside()
        clock.add("forward", begin)
    streamed.free(block)


def _run_on(walk: Walk, block: Block) -> None:
    """Let every batch that is at or inside the block run to the next block."""
    for batch in range(len(walk)):
        here = walk.at[batch].module
        if here is not None and (here == block.name or here.startswith(block.name + ".")):
            walk.advance(batch)


def _restore(
    streamed: StreamedModel, wanted: list[Linear], part: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Put the weights that an earlier run wrote into the loaded block."""
    for linear in wanted:
        stem = linear.tensor.removesuffix("weight")
        tensors = {name.removeprefix(stem): tensor for name, tensor in part.items() if name.startswith(stem)}
        weight = Affine.from_tensors(tensors, record["modules"][linear.name])
        streamed.replace(linear.name, weight.dense(streamed.product_dtype).to(streamed.device))


class _BlockWork:
    """One block's linears, compressed in the order in which the batches reach them."""

    def __init__(self, job: Job, streamed: StreamedModel, walk: Walk, clock: Clock) -> None:
        self._job, self._streamed, self._walk, self._clock = job, streamed, walk, clock
        self.done: dict[str, Affine] = {}
        self.records: dict[str, dict[str, Any]] = {}

    def run(self, block: Block, wanted: list[Linear]) -> None:
        """Compress all of `wanted`; afterwards every batch waits inside or before the block, or is past it."""
        place = {linear.name: number for number, linear in enumerate(wanted)}
        by_name = {linear.name: linear for linear in wanted}
        self._walk.stop_at(place)
        moving = [b for b in range(len(self._walk)) if self._walk.at[b].module == block.name]
        while len(self.done) < len(wanted):
            begin = time.perf_counter()
            for batch in moving:
                self._walk.advance(batch)
            self._streamed.free_outside()
            self._clock.add("forward", begin)
            here = {b: at.module for b in range(len(self._walk)) if (at := self._walk.at[b]).module in place}
            if not here:
                break
            name = min(here.values(), key=lambda module: place[str(module)])
            moving = [batch for batch, module in here.items() if module == name]
            shared = self._statistics(by_name[str(name)], moving)
            self._compress(by_name[str(name)], shared)
            if shared is not None and len(self.done) < len(wanted):
                self._siblings(by_name, moving.pop(0), shared)
        for linear in wanted:
            if linear.name not in self.done:
                self._compress(linear, None)

    def _siblings(self, by_name: Mapping[str, Linear], scout: int, shared: _Shared) -> None:
        """Compress the linears that are handed the very tensor that `shared` was gathered from.

        One batch runs ahead to find them; the others then needn't wait there with what the first linear put out.
        """
        seen = self._walk.at[scout].input
        while True:
            begin = time.perf_counter()
            here = self._walk.advance(scout)
            self._streamed.free_outside()
            self._clock.add("forward", begin)
            linear = by_name.get(here.module or "")
            if linear is None or here.input is not seen:
                return
            self._compress(linear, shared)

    def _statistics(self, linear: Linear, batches: list[int]) -> _Shared | None:
        if not self._method(linear).hessian:
            return None
        begin = time.perf_counter()
        self._walk.settle()
        width = linear.shape[1]
        total = torch.zeros(width, width, dtype=torch.float32, device=self._streamed.device)
        tokens = 0
        for batch in batches:
            with self._walk.input(batch) as tensor:
                tokens += accumulate(total, tensor)
        self._clock.add("hessian", begin)
        return _Shared(finish(total, tokens), tokens)

    def _compress(self, linear: Linear, shared: _Shared | None) -> None:
        begin = time.perf_counter()
        stored = self._streamed.weight(linear.name)
        weight = stored.float().contiguous()
        _require_finite(weight, linear)
        settings = self._job.targets[linear.name]
        method, fallback = self._method(linear), None
        prepared = None
        if method.hessian:
            if shared is None or shared.tokens == 0:
                fallback = "no calibration token reached it"
            else:
                try:
                    if settings not in shared.prepared:
                        shared.prepared[settings] = method.prepare(shared.hessian, settings)
                        self._walk.settle()
                    prepared = shared.prepared[settings]
                except SingularHessianError as error:
                    fallback = str(error)
        stored_dtype = self._streamed.checkpoint.tensors[linear.tensor].dtype
        scale_dtype = torch.float32 if stored_dtype == "F64" else DTYPES[stored_dtype]
        if fallback is None:
            compressed = method.compress(weight, prepared, settings, scale_dtype)
        else:
            plain = Rtn(**settings.model_dump(include=set(Rtn.model_fields) - {"method"}))
            compressed = METHODS[Rtn].compress(weight, None, plain, scale_dtype)
        dense = compressed.dense(torch.float32)
        self.done[linear.name] = compressed
        self.records[linear.name] = {
            "bits": compressed.bits,
            "method": settings.method if fallback is None else "rtn",
            "group_size": compressed.group_size,
            "tokens": 0 if shared is None else shared.tokens,
            "weight_error": float((weight - dense).norm() / weight.norm().clamp(min=1e-30)),
            "error": None if shared is None or shared.tokens == 0 else relative_error(weight, dense, shared.hessian),
            "fallback": fallback,
            "note": method.note(prepared, settings) if prepared is not None else None,
        }
        if self._job.propagate == "compressed":
            self._streamed.replace(linear.name, dense)
        self._walk.pass_by(linear.name)
        self._walk.settle()
        self._clock.add("solve", begin)

    def _method(self, linear: Linear) -> LayerMethod:
        return METHODS[type(self._job.targets[linear.name])]


def _require_finite(weight: Tensor, linear: Linear) -> None:
    if not torch.isfinite(weight).all():
        count = int((~torch.isfinite(weight)).sum())
        raise CheckpointError(
            f"{linear.tensor} holds {count} values that are NaN or infinite: the checkpoint is damaged; "
            f"fetch it again, or leave the module out with --ignore {linear.name}."
        )


def _check_fallbacks(job: Job, writer: CheckpointWriter) -> None:
    fallen = [
        (name, record["fallback"])
        for part in writer.done.values()
        for name, record in part["modules"].items()
        if record["fallback"]
    ]
    if len(fallen) > MOST_FALLBACKS * len(job.targets):
        name, reason = fallen[0]
        raise ModelzipError(
            f"{len(fallen)} of {len(job.targets)} modules would have been rounded to nearest instead, the first "
            f"{name}: {reason}; give more calibration data (--samples), or choose --method rtn."
        )
