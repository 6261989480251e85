"""Whether a stage takes the experts of mixtures apart: it does if it compresses any of them."""

from __future__ import annotations

from dataclasses import replace

from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.unfused import UnfusedCheckpoint, unfused
from modelzip.recipes.match import settings_for
from modelzip.weights.experts import UNFUSED
from modelzip.weights.layouts import COMPRESSED_TENSORS

from .request import Request

TAKES_APART = frozenset({"quantize", "factorize"})
"""Stages whose results hold experts one by one. What is pruned stays as transformers has it, experts left alone."""


def with_experts(request: Request) -> Request:
    """The stage as it stands before the experts of mixtures, one by one, if it compresses any."""
    if request.stage.kind not in TAKES_APART or getattr(request.stage.settings, "layout", "") == COMPRESSED_TENSORS:
        return request
    view = unfused(request.checkpoint)
    experts = (name.rpartition(".")[0] for name in view.made_names if name.endswith(".weight"))
    is_wanted = any(settings_for(request.stage, name) is not None for name in experts)
    return replace(request, checkpoint=view) if is_wanted else request


def experts_note(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the plan says of experts that the stage takes apart."""
    if not isinstance(checkpoint, UnfusedCheckpoint):
        return ()
    mixtures = (checkpoint.quantization or {})[UNFUSED]
    return (f"the experts of {len(mixtures)} mixtures are taken apart, each for the tokens that are sent to it",)
