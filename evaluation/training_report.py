"""What report.md says of the stages that train, from their `details`. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from .markdown import fold, number, table
from .schema import StageResult

ROWS: Final = 10
"""Rows of a loss curve, at most."""


def training_lines(stages: Sequence[StageResult]) -> str:
    """For each stage that trained: how long, where the loss went, what was kept, and its curve, folded."""
    parts = []
    for place, stage in enumerate(stages, 1):
        if "curve" in stage.details:
            which = f"stage {place}, {stage.kind} {stage.method}" if len(stages) > 1 else stage.method
            parts += [_summary(which, stage.details), *_runs(stage.details)]
            parts.append(fold(f"Loss curve ({which})", _curve(stage.details)))
    return "\n\n".join(parts)


def _summary(which: str, details: Mapping[str, Any]) -> str:
    early = ", stopped early" if details["stopped_early"] else ""
    first, last = (number(details[name], ".4f") for name in ("first_loss", "last_loss"))
    losses = f"{first} at first, {last} at last" if _losses(details) > 1 else f"{last} on average"
    lines = [f"Trained ({which}): {details['steps']:,} steps, {details['epochs']:.1f} epochs{early}; loss {losses}."]
    if details["kept"] is not None:
        best, kept = (_measured(details[name]) for name in ("best", "kept"))
        lines.append(f"Best measurement: {best}. Kept: {kept}." if best != kept else f"Kept the best: {best}.")
    if (baseline := details.get("baseline")) is not None:
        lines.append(f"The same student trained on labels alone: {_measured(baseline)}.")
    return "  \n".join(lines)


def _losses(details: Mapping[str, Any]) -> int:
    """How often the loss was logged: each time as the mean since the time before."""
    return sum("loss" in row for row in details["curve"])


def _measured(row: Mapping[str, Any]) -> str:
    accuracy = "" if row.get("accuracy") is None else f", accuracy {100 * row['accuracy']:.2f} %"
    return f"loss {row['eval_loss']:.4f}{accuracy} after step {row['step']:,}"


def _runs(details: Mapping[str, Any]) -> list[str]:
    """A row for each training of a stage that trains several times, such as the lottery's rounds and controls."""
    rows = [
        [
            run["name"],
            number(run["sparsity"], ".4f"),
            number(run["loss"], ".4f"),
            number(run.get("eval_loss"), ".4f"),
            number(run.get("accuracy"), ".4f"),
        ]
        for run in details.get("runs", ())
    ]
    return [table(("training", "sparsity", "loss", "measured loss", "accuracy"), rows)] if rows else []


def _curve(details: Mapping[str, Any]) -> str:
    """At most so many rows, spread evenly, the first and the last among them."""
    curve: Sequence[Mapping[str, Any]] = details["curve"]
    count = min(ROWS, len(curve))
    places = sorted({round(place * (len(curve) - 1) / max(1, count - 1)) for place in range(count)})
    names = ("step", "epoch", "loss", "sparsity", "eval_loss", "accuracy")
    forms = (",d", ".2f", ".4f", ".4f", ".4f", ".4f")
    shown = [index for index, name in enumerate(names) if any(name in curve[place] for place in places)]
    rows = [[number(curve[place].get(names[index]), forms[index]) for index in shown] for place in places]
    header = ("step", "epoch", "loss", "sparsity", "measured loss", "accuracy")
    return table([header[index] for index in shown], rows)
