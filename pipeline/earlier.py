"""Weights that an earlier run wrote before it was stopped, put into the blocks that the batches run through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from modelzip.checkpoints.blocks import Block
from modelzip.checkpoints.streamed import StreamedModel
from modelzip.checkpoints.writer import CheckpointWriter

from .matrices import written_weight
from .module_plan import ModulePlan


def is_written(name: str, writer: CheckpointWriter) -> bool:
    """Whether the module lies in a part that is there already."""
    return any(name in record["modules"] for record in writer.done.values())


def restore(streamed: StreamedModel, block: Block, plans: Sequence[ModulePlan], writer: CheckpointWriter) -> None:
    """Put the block's own part into the block, which is loaded."""
    part, record = writer.read_part(block.name), writer.done[block.name]
    for plan in plans:
        _put(streamed, plan.name, plan, part, record)


def restore_shared(
    streamed: StreamedModel, block: Block, targets: Mapping[str, ModulePlan], writer: CheckpointWriter
) -> None:
    """Put weights that were written with an earlier block into this one, which uses them too."""
    users = {name: targets[owner] for name, owner in block.sharers.items() if owner in targets}
    for part, record in writer.done.items() if users else ():
        here = {name: plan for name, plan in users.items() if plan.name in record["modules"]}
        tensors = writer.read_part(part) if here else {}
        for name, plan in here.items():
            _put(streamed, name, plan, tensors, record)


def _put(
    streamed: StreamedModel, name: str, plan: ModulePlan, part: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    weight = written_weight(plan, part, record)
    if weight is not None:
        streamed.hold(name, weight)
