"""Which engine runs a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from modelzip.checkpoints.index import Checkpoint
from modelzip.evaluation.bits_report import CHOICE
from modelzip.evaluation.cache_report import CACHE

from .context import Context
from .layer_plan import LayerPlan
from .layer_stage import layer_fingerprint, run_layers
from .plans import Plan
from .structural import StructuralPlan, run_structural, structural_fingerprint
from .text import Windows
from .train.plan import TrainingPlan
from .training import run_training, training_fingerprint, training_section

LISTED: Final = 64
"""Members of a list, at most, that a report repeats; longer ones are in modelzip.json alone."""


def stage_fingerprint(context: Context, plan: Plan) -> str:
    """What a resumed stage must share with the interrupted one."""
    match plan:
        case LayerPlan():
            return layer_fingerprint(context, plan)
        case StructuralPlan():
            return structural_fingerprint(context, plan)
        case TrainingPlan():
            return training_fingerprint(context, plan)
    raise AssertionError(f"a plan of no engine: {plan}")


def stage_details(plan: Plan, records: Mapping[str, Any]) -> dict[str, Any]:
    """The report's `details` of a stage: nothing for one whose modules have rows of their own."""
    match plan:
        case LayerPlan():
            return {key: record for key, record in records.items() if key in (CHOICE, CACHE)}
        case StructuralPlan():
            return {module: _brief(record) for module, record in records.items()}
        case TrainingPlan():
            return training_section(records)
    return {}


def _brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """Without long lists of what was kept, such as a thousand neurons."""
    return {key: value for key, value in record.items() if not isinstance(value, list) or len(value) <= LISTED}


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
    """Run one stage and publish its result at `target`; returns what it recorded.

    describe: makes modelzip.json from the record. Raises what the writer and the engines raise.
    """
    common: dict[str, Any] = {"target": target, "describe": describe, "overwrite": overwrite, "resume": resume}
    match plan:
        case LayerPlan():
            return run_layers(plan, source, windows=windows, context=context, **common)
        case StructuralPlan():
            return run_structural(plan, source, windows=windows, context=context, **common)
        case TrainingPlan():
            return run_training(plan, source, context=context, **common)
    raise AssertionError(f"a plan of no engine: {plan}")
