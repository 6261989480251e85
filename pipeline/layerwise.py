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
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.streamed import StreamedModel, start
from modelzip.checkpoints.walk import Walk
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.weights.layouts import MODELZIP, stored_tensors
from modelzip.weights.value import CompressedWeight

from . import solve
from .blockwise import tune_block
from .clock import Clock
from .earlier import is_written, restore, restore_shared
from .fallbacks import check_fallbacks
from .hessian import accumulate, finish, widen
from .matrices import dense_parts, record_of, require_finite, stored_weight
from .module_plan import ModulePlan, method_of, value_dtype
from .progress import Progress
from .serving import pooled_statistics
from .solve import Statistic
from .table_stage import round_table


@dataclass(frozen=True)
class Job:
    """What the engine is to do. targets: the plan of each linear to be compressed, by module name; tables: those of
    embeddings. layout: in which the results are written. scaled: what the report says of the scales of a module's
    inputs, by its name."""

    kind: str
    targets: Mapping[str, ModulePlan]
    propagate: str
    seed: int
    spill_limit: int
    spill_folder: Path | None
    tables: tuple[ModulePlan, ...] = ()
    layout: str = MODELZIP
    scaled: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Known:
    """Found before the first linear is compressed. surveyed: by the method, over all matrices. pooled: the statistics
    of matrices that serve several layers, by the first one's name."""

    surveyed: Any
    pooled: Mapping[str, Statistic]


def compress_blocks(
    job: Job,
    streamed: StreamedModel,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    writer: CheckpointWriter,
    clock: Clock,
    progress: Progress,
) -> None:
    """Compress every table and target and write each table and block as a part, with a record for each module.

    Without batches (methods that need no data) blocks are only read, compressed and written. Blocks that the writer
    has already are not compressed again: the batches run through them as they were written. Gradients must be off.
    Raises CheckpointError for weights that aren't finite, ModelzipError if too many modules had to fall back.
    """
    blocks = streamed.structure.blocks
    begin = time.perf_counter()
    ahead = [plan for plan in job.targets.values() if not is_written(plan.name, writer)]
    limits: dict[str, Any] = {"spill_limit": job.spill_limit, "spill_folder": job.spill_folder}
    known = _Known(survey(job, streamed.checkpoint), pooled_statistics(streamed, batches, ahead, **limits))
    begin = clock.add("statistics", begin)
    for plan in job.tables:
        round_table(plan, streamed, writer=writer, seed=job.seed, propagate=job.propagate)
    clock.add("solve", begin)
    walk = streamed.walk(batches, spill_limit=job.spill_limit, spill_folder=job.spill_folder)
    try:
        begin = time.perf_counter()
        start(walk, streamed)
        clock.add("forward", begin)
        last = max((i for i, block in enumerate(blocks) if _wanted(block, job)), default=-1)
        for number, block in enumerate(blocks[: last + 1]):
            progress.step(job.kind, number, len(blocks), block.name)
            _one_block(job, streamed, block, known=known, walk=walk, writer=writer, clock=clock, is_last=number == last)
        progress.step(job.kind, len(blocks), len(blocks))
    finally:
        walk.close()
    check_fallbacks(job.targets, writer)


def _wanted(block: Block, job: Job) -> list[Linear]:
    return [linear for linear in block.linears if linear.name in job.targets]


def _one_block(
    job: Job,
    streamed: StreamedModel,
    block: Block,
    *,
    known: _Known,
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
    if job.propagate == "compressed":
        restore_shared(streamed, block, job.targets, writer)
    clock.add("read", begin)
    if block.name in writer.done:
        if job.propagate == "compressed":
            restore(streamed, block, [job.targets[one.name] for one in wanted], writer)
    elif wanted:
        work = _BlockWork(job, streamed, known, walk=walk, clock=clock)
        work.run(block, wanted)
        begin = time.perf_counter()
        plans = [job.targets[linear.name] for linear in wanted]
        record = {"modules": {plan.name: work.records[plan.name] for plan in plans}}
        replaces = [name for plan in plans for name in plan.replaces]
        tensors = _tensors(plans, work, streamed.checkpoint, job.layout)
        writer.write_part(block.name, tensors, replaces=replaces, record=record)
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


def _tensors(plans: Sequence[ModulePlan], work: _BlockWork, checkpoint: Checkpoint, layout: str) -> dict[str, Tensor]:
    """What the block's part holds: the compressed weights, and as they were those that the method had to leave."""
    tensors: dict[str, Tensor] = {}
    for plan in plans:
        weight = work.done[plan.name]
        if weight is None:
            tensors |= checkpoint.read(plan.replaces)
        else:
            tensors |= {plan.stem + suffix: tensor for suffix, tensor in stored_tensors(weight, layout).items()}
    return tensors


def survey(job: Job, checkpoint: Checkpoint) -> Any:
    """What the stage's method finds by looking at all matrices before the first is compressed; None if it doesn't."""
    methods = {method_of(plan.settings).survey for plan in job.targets.values()} - {None}
    if not methods:
        return None
    (look,) = methods
    assert look is not None
    plans = [plan for plan in job.targets.values() if _is_surveyed(plan)]
    return look((plan.settings, part) for plan in plans for part in dense_parts(plan, checkpoint))


def _is_surveyed(plan: ModulePlan) -> bool:
    asks = method_of(plan.settings).is_surveyed
    return asks is None or asks(plan.settings)


class _BlockWork:
    """One block's linears, compressed in the order in which the batches reach them."""

    def __init__(self, job: Job, streamed: StreamedModel, known: _Known, *, walk: Walk, clock: Clock) -> None:
        self._job, self._streamed, self._known, self._walk, self._clock = job, streamed, known, walk, clock
        self.done: dict[str, CompressedWeight | None] = {}
        self.records: dict[str, dict[str, Any]] = {}

    def run(self, block: Block, wanted: list[Linear]) -> None:
        """Compress all of `wanted`; afterwards every batch waits inside or before the block, or is past it."""
        if any(method_of(self._job.targets[linear.name].settings).tune for linear in wanted):
            self._together(block, wanted)
            return
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

    def _together(self, block: Block, wanted: list[Linear]) -> None:
        begin = time.perf_counter()
        plans = [self._job.targets[linear.name] for linear in wanted]
        self.done, self.records = tune_block(plans, self._streamed, self._walk, block, seed=self._job.seed)
        for name, made in self.done.items() if self._job.propagate == "compressed" else ():
            if made is not None:
                self._streamed.hold(name, made)
        self._clock.add("solve", begin)

    def _siblings(self, by_name: Mapping[str, Linear], scout: int, shared: Statistic) -> None:
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
            mine = self._known.pooled.get(linear.name)
            if mine is not shared and (mine is not None or shared.is_pooled):
                return
            plan = self._job.targets[linear.name]
            if shared.value.ndim == 1 and solve.statistic_of(plan) == "hessian":
                return
            if shared.largest is None and solve.asks_for_largest(plan):
                return
            self._compress(linear, shared)

    def _statistics(self, linear: Linear, batches: list[int]) -> Statistic | None:
        plan = self._job.targets[linear.name]
        kind, asked = solve.statistic_of(plan), solve.asks_for_largest(plan)
        if kind == "none" and not asked:
            return None
        if linear.name in self._known.pooled:
            return self._known.pooled[linear.name]
        begin = time.perf_counter()
        self._walk.settle()
        width = linear.shape[1]
        shape = (width, width) if kind == "hessian" else (width,)
        zeros: dict[str, Any] = {"dtype": torch.float32, "device": self._streamed.device}
        total, largest = torch.zeros(shape, **zeros), torch.zeros(width, **zeros) if asked else None
        tokens = 0
        for batch in batches:
            with self._walk.input(batch) as tensor:
                tokens += accumulate(total, tensor)
                if largest is not None:
                    widen(largest, tensor)
        self._clock.add("statistics", begin)
        return Statistic(finish(total, tokens), tokens, largest=largest)

    def _compress(self, linear: Linear, shared: Statistic | None) -> None:
        begin = time.perf_counter()
        plan = self._job.targets[linear.name]
        weight = self._streamed.weight(linear.name).float().contiguous()
        require_finite(weight, linear)
        job = solve.Job(value_dtype(plan.before), self._known.surveyed, self._job.seed)
        now = stored_weight(plan, self._streamed.checkpoint)
        solved = solve.solve(linear.name, weight, now, settings=plan.settings, statistic=shared, job=job)
        self._walk.settle()
        made = solved.weight
        self.done[linear.name] = made
        record = record_of(weight, solved, shared)
        if (scaled := self._job.scaled.get(linear.name)) is not None:
            record["scaled"] = scaled
        self.records[linear.name] = record
        if self._job.propagate == "compressed":
            if made is None:
                self._streamed.replace(linear.name, weight)
            else:
                self._streamed.hold(linear.name, made)
        self._walk.pass_by(linear.name)
        self._walk.settle()
        self._clock.add("solve", begin)
