"""Which engine runs a stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelzip.checkpoints.index import Checkpoint

from .context import Context
from .layer_plan import LayerPlan
from .layer_stage import run_layers
from .plans import Plan
from .text import Windows


def stage_fingerprint(context: Context, plan: Plan) -> str:
    """What a resumed stage must share with the interrupted one. The layout may depend on the machine's libraries."""
    return context.fingerprint + (plan.layout if isinstance(plan, LayerPlan) else plan.kind)


def run_stage(
    plan: Plan,
    source: Checkpoint,
    *,
    target: Path,
    windows: Windows | None,
    describe: Callable[[dict[str, Any]], bytes],
    overwrite: bool,
    resume: bool,
    context: Context,
) -> dict[str, Any]:
    """Run one stage and publish its result at `target`; returns what it recorded, by module or by subject.

    describe: makes modelzip.json from the records. Raises what the writer and the engines raise.
    """
    fingerprint = stage_fingerprint(context, plan)
    assert isinstance(plan, LayerPlan)
    return run_layers(
        plan,
        source,
        target=target,
        fingerprint=fingerprint,
        windows=windows,
        describe=describe,
        overwrite=overwrite,
        resume=resume,
        context=context,
    )
