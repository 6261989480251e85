"""`modelzip evaluate MODEL --against ORIGINAL --data FILE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from modelzip.checkpoints.locate import check_named
from modelzip.evaluation import gates
from modelzip.recipes.schema import Evaluation

from .options import Option, command, field_option, machine_options, switch_options
from .output import write_json
from .request import checked

MODEL: Final = Option(
    "model", (), "A folder, a hub id or a .gguf file.", "argument", ("model",), metavar="MODEL", required=True
)
AGAINST: Final = Option(
    "against", ("--against",), "The original model, for KL divergence and top-1 agreement.", metavar="ORIGINAL"
)
DRAFT: Final = Option(
    "draft", ("--draft",), "A smaller model that writes ahead for this one, to be timed with it.", metavar="MODEL"
)
DATA: Final = Option(
    "data",
    ("--data",),
    "Evaluation text: a .txt, .jsonl or .parquet file, or a hub dataset as NAME or NAME:CONFIG; for classifiers, "
    "labelled examples from the same or a .tsv or .csv file.",
    path=("evaluate", "data"),
    metavar="FILE",
    required=True,
)


def evaluate() -> Callable[..., None]:
    """The command `evaluate`."""
    windows = ("windows", "seq_len", "field", "split", "masked")
    labelled = ("task", "text", "pair", "label", "examples", "batch_size", "exit_threshold")
    written = ("tasks", "task_path", "task_limit", "samples", "new_tokens")
    timed = ("latency", "batch_sizes")
    options = [
        MODEL,
        AGAINST,
        DRAFT,
        DATA,
        *(
            field_option(Evaluation, key, ("evaluate", key), panel=None)
            for key in (*windows, *labelled, *written, *timed, "fail_if")
        ),
        *machine_options(),
        *switch_options("json", "debug"),
    ]
    doc = "Measure a model against its original. Perplexity or accuracy, KL divergence, top-1 agreement, size."
    return command(options, lambda values: _evaluate(options, values), doc)


def _evaluate(options: list[Option], values: Mapping[str, Any]) -> None:
    data: dict[str, Any] = {}
    renamed: dict[str, str] = {}
    for option in options:
        if option.path and values.get(option.name) is not None:
            *section, key = option.path
            target = data.setdefault(section[0], {}) if section else data
            target[key] = values[option.name]
            renamed[".".join(option.path)] = option.said
    recipe = checked(data, "", renamed=renamed, least_stages=0)
    conditions = gates.parse_gates(recipe.evaluate.fail_if)
    gates.require_measured(conditions, evaluation=True, original=values["against"] is not None)
    named = [str(recipe.model), *([] if values["against"] is None else [values["against"]])]
    for number, one in enumerate(named, 1):  # a revision is that of the original
        check_named(one, revision=recipe.revision if number == len(named) else None)
    if values["draft"] is not None:
        check_named(values["draft"], revision=None)
    from modelzip.checkpoints.memory import keep_freed
    from modelzip.pipeline.evaluate import evaluate_models

    from .progress import shown_progress
    from .show import show_report

    keep_freed()
    with shown_progress() as progress:
        report = evaluate_models(
            str(recipe.model),
            against=values["against"],
            draft=values["draft"],
            evaluation=recipe.evaluate,
            revision=recipe.revision,
            device=recipe.device,
            dtype=recipe.dtype,
            progress=progress,
        )
    if values["json"]:
        write_json(report)
    else:
        show_report(report)
    gates.check_gates(conditions, gates.metrics(report))
