"""Embedding tables rounded before the blocks are compressed, each a part of its own."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from modelzip.checkpoints.streamed import StreamedModel
from modelzip.checkpoints.writer import CheckpointWriter

from . import solve
from .matrices import dense_weight, record_of, require_finite, stored_weight, written_weight
from .module_plan import ModulePlan, value_dtype


def round_table(
    plan: ModulePlan, streamed: StreamedModel, *, writer: CheckpointWriter, seed: int, propagate: str
) -> None:
    """Round an embedding's table, and let the blocks see what is looked up in the rounded one."""
    checkpoint = streamed.checkpoint
    if plan.name not in writer.done:
        weight = dense_weight(plan, checkpoint).to(streamed.device).contiguous()
        require_finite(weight, plan.linear)
        task = solve.Job(value_dtype(plan.before), None, seed)
        now = stored_weight(plan, checkpoint)
        solved = solve.solve(plan.name, weight, now, settings=plan.settings, statistic=None, job=task)
        assert solved.weight is not None, "to round to nearest always serves"
        tensors = {plan.stem + suffix: tensor for suffix, tensor in solved.weight.tensors().items()}
        record = record_of(weight, solved, None)
        writer.write_part(plan.name, tensors, replaces=plan.replaces, record={"modules": {plan.name: record}})
    if propagate == "compressed":
        for name in (plan.name, *plan.linear.sharers):
            streamed.stand_in(name, partial(_table, plan, writer))


def _table(plan: ModulePlan, writer: CheckpointWriter) -> Tensor:
    weight = written_weight(plan, writer.read_part(plan.name), writer.done[plan.name])
    assert weight is not None
    return weight.dense(value_dtype(plan.before))
