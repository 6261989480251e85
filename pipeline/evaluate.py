"""One model measured against another, without anything being compressed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from modelzip.checkpoints.errors import RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.evaluation.gates import Gate, parse_gates, require_measured
from modelzip.evaluation.report import report_json, validate
from modelzip.recipes.schema import Evaluation

from .bench import Bench
from .calibrate import evaluation_windows, shortened, window_limit
from .called import EVALUATE
from .checks import check_alone, check_classes, check_comparable, check_kernels, check_measures, check_predicts
from .data_kind import kind_of
from .draft import check_draft, draft_section
from .early_exits import check_exits
from .environment import environment, package_version, peak_memory_mb
from .identity import header_hash
from .measure import open_running, pick_device
from .measured import check_evaluation, examples_section, windows_section
from .progress import Progress
from .samples import sample_texts
from .sections import size_section
from .tasks import task_rows


def evaluate_models(
    model: str,
    *,
    against: str | None,
    evaluation: Evaluation,
    revision: str | None,
    device: str,
    dtype: str,
    progress: Progress,
    draft: str | None = None,
) -> dict[str, Any]:
    """Measure one model, against another if given, on `evaluation.data`; returns a report.

    draft: a smaller model that writes ahead for it, which is timed as well.
    """
    started = time.perf_counter()
    gates = parse_gates(evaluation.fail_if)
    require_measured(gates, evaluation=True, original=against is not None)
    if evaluation.data is None:
        raise RecipeError("Nothing to evaluate on: name a text file with --data FILE.")
    where = pick_device(device)
    check_kernels(where)
    checkpoint = Checkpoint.open(model, revision=revision if against is None else None)
    original = None if against is None else Checkpoint.open(against, revision=revision)
    evaluation = shortened(evaluation, window_limit(checkpoint))
    check_evaluation(evaluation, [checkpoint], original, called=EVALUATE, drafts=draft is not None)
    kind = kind_of(evaluation, checkpoint.config)
    check_exits(evaluation, checkpoint.config, labelled=kind == "classification")
    check_measures(gates, checkpoint, kind, evaluation, drafted=draft is not None)
    helper = None if draft is None else Checkpoint.open(draft)
    if helper is not None:
        check_draft(checkpoint, helper, evaluation, said="--draft")
    bench = Bench(dtype, where, progress)
    with torch.no_grad():
        if kind == "tokens":
            section = _on_windows(checkpoint, original, helper, gates, evaluation, bench)
        else:
            if kind == "classification":
                check_classes(checkpoint, original)
            section = examples_section(kind, checkpoint, original, evaluation, bench)
    report = {
        "modelzip": package_version("modelzip"),
        "command": "evaluate",
        "recipe": {"model": model, "against": against, "draft": draft, "evaluate": evaluation.model_dump(mode="json")},
        "source": {"name": against or model, "sha256": header_hash(original or checkpoint), "revision": revision},
        "output": None,
        "evaluation": section,
        "size": size_section(original, checkpoint),
        "time": {"total_s": time.perf_counter() - started, "phases": {}},
        "peak_memory_mb": peak_memory_mb(),
        "environment": environment(where),
    }
    return dict(json.loads(report_json(validate(report))))


def _on_windows(
    checkpoint: Checkpoint,
    original: Checkpoint | None,
    draft: Checkpoint | None,
    gates: Sequence[Gate],
    evaluation: Evaluation,
    bench: Bench,
) -> dict[str, Any]:
    """The report's `evaluation` on windows of a text."""
    if original is not None:
        check_comparable(checkpoint, original)
    network = open_running(checkpoint, bench.dtype, bench.device).model
    check_predicts(gates, network, checkpoint)
    if original is None:
        check_alone(network, checkpoint)
    windows = evaluation_windows(evaluation, checkpoint, network, called=EVALUATE)
    section = windows_section(checkpoint, original, windows, evaluation, bench)
    section["tasks"] = task_rows(checkpoint, original, evaluation, bench)
    section["samples"] = sample_texts(checkpoint, original, windows.tokens, evaluation, bench)
    if draft is not None:
        section["speculative"] = draft_section(checkpoint, draft, windows.tokens, evaluation, bench)
    return section
