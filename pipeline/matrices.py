"""One matrix: as the checkpoint holds it, what the report says of it, and as it was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modelzip.checkpoints.blocks import Linear
from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.weights.kinds import from_tensors
from modelzip.weights.layouts import decoder
from modelzip.weights.low_rank import LowRank
from modelzip.weights.value import CompressedWeight

from .hessian import relative_error
from .module_plan import ModulePlan
from .solve import Solved, Statistic


def stored_weight(plan: ModulePlan, checkpoint: Checkpoint) -> CompressedWeight | None:
    """The weight as the checkpoint holds it, None if that is dense."""
    if plan.before.kind == "dense":
        return None
    assert checkpoint.quantization is not None
    tensors = {name.removeprefix(plan.stem): tensor for name, tensor in checkpoint.read(plan.replaces).items()}
    return decoder(checkpoint.quantization)(plan.name, tensors)


def dense_weight(plan: ModulePlan, checkpoint: Checkpoint) -> Tensor:
    stored = stored_weight(plan, checkpoint)
    if stored is not None:
        return stored.dense(torch.float32)
    weight = checkpoint.read([plan.linear.tensor], dtype=torch.float32)[plan.linear.tensor]
    return weight.T if plan.linear.transposed else weight


def dense_parts(plan: ModulePlan, checkpoint: Checkpoint) -> tuple[Tensor, ...]:
    """What a method will be given of a matrix, in fp32: both factors of a product, else the matrix itself."""
    stored = stored_weight(plan, checkpoint) if plan.before.kind == LowRank.kind else None
    if isinstance(stored, LowRank):
        return stored.right.dense(torch.float32), stored.left.dense(torch.float32)
    return (dense_weight(plan, checkpoint),)


def require_finite(weight: Tensor, linear: Linear) -> None:
    if not torch.isfinite(weight).all():
        count = int((~torch.isfinite(weight)).sum())
        raise CheckpointError(
            f"{linear.tensor} holds {count} values that are NaN or infinite: the checkpoint is damaged; "
            f"fetch it again, or leave the module out with --ignore {linear.name}."
        )


def record_of(weight: Tensor, solved: Solved, statistic: Statistic | None) -> dict[str, Any]:
    """What the report says of a matrix. weight: fp32 [out, in], as it was."""
    made = solved.weight
    dense = weight if made is None else made.dense(torch.float32)
    hessian = None if statistic is None else statistic.hessian
    return {
        "weight": None if made is None else made.meta(),
        "method": solved.method,
        "tokens": 0 if statistic is None else statistic.tokens,
        "weight_error": float((weight - dense).norm() / weight.norm().clamp(min=1e-30)),
        "error": None if hessian is None else relative_error(weight, dense, hessian),
        "fallback": solved.fallback,
        "note": solved.note,
    }


def written_weight(plan: ModulePlan, part: Mapping[str, Tensor], record: Mapping[str, Any]) -> CompressedWeight | None:
    """A module's weight as it was written, None if it was left as it is."""
    meta = record["modules"][plan.name]["weight"]
    if meta is None:
        return None
    return from_tensors({n.removeprefix(plan.stem): t for n, t in part.items() if n.startswith(plan.stem)}, meta)
