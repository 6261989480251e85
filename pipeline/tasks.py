"""Tasks of EleutherAI's lm-evaluation-harness, each asked of the original and of the compressed model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from typing import Any

from modelzip.checkpoints.errors import CalibrationError, RecipeError
from modelzip.checkpoints.index import Checkpoint
from modelzip.recipes.problems import suggestion
from modelzip.recipes.schema import Evaluation

from .bench import Bench
from .calibrate import tokenizer_of
from .data_kind import writes
from .opened import open_by_transformers


def check_tasks(evaluation: Evaluation, checkpoint: Checkpoint) -> None:
    """Raise an error if the tasks can't be asked of the model: lm-eval isn't there, a name is unknown, or data can't be
    read. The data are fetched here, before any work is done.
    """
    if not evaluation.tasks:
        return
    if find_spec("lm_eval") is None:
        raise RecipeError("evaluate.tasks needs lm-evaluation-harness: pip install 'modelzip[tasks]'.")
    if not writes(checkpoint.config):
        named = ", ".join(checkpoint.config.get("architectures") or ()) or "of no named architecture"
        raise RecipeError(f"evaluate.tasks asks models that write text, and {checkpoint.source} is {named}.")
    from lm_eval.tasks import get_task_dict

    with _quiet():
        manager = _manager(evaluation)
        known = manager.all_tasks
        unknown = [name for name in evaluation.tasks if name not in known]
        if unknown:
            raise RecipeError(f"evaluate.tasks: there is no task {unknown[0]}; {_near(unknown[0], known)}")
        try:
            get_task_dict(list(evaluation.tasks), manager)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            told = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            names = ", ".join(evaluation.tasks)
            raise CalibrationError(f"evaluate.tasks: the data of {names} can't be read: {told}.") from None


def task_rows(
    compressed: Checkpoint,
    original: Checkpoint | None,
    evaluation: Evaluation,
    bench: Bench,
) -> list[dict[str, Any]]:
    """The report's `tasks`: a row for each metric of each task. One model is in memory at a time."""
    if not evaluation.tasks:
        return []
    sources = [compressed] if original is None else [compressed, original]
    found: list[Mapping[str, Any]] = []
    for number, source in enumerate(sources):
        bench.progress.step("tasks", number, len(sources), ", ".join(evaluation.tasks))
        found.append(_asked(source, evaluation, bench))
    bench.progress.step("tasks", len(sources), len(sources))
    mine, theirs = found[0], found[1] if len(found) > 1 else None
    return [
        {
            "task": task,
            "metric": metric,
            "examples": int(mine["n-samples"].get(task, {}).get("effective", 0)) or None,
            "original": None if theirs is None else _number(theirs["results"][task].get(key)),
            "original_error": None if theirs is None else _number(theirs["results"][task].get(error)),
            "compressed": _number(value),
            "compressed_error": _number(mine["results"][task].get(error)),
        }
        for task, figures in mine["results"].items()
        for key, value in figures.items()
        for metric, _, filtered in [key.partition(",")]
        for error in [f"{metric}_stderr,{filtered}"]
        if filtered and not metric.endswith("_stderr") and isinstance(value, int | float)
    ]


def _asked(source: Checkpoint, evaluation: Evaluation, bench: Bench) -> Mapping[str, Any]:
    """What the harness finds of one model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = open_by_transformers(source, bench.device, dtype=bench.dtype), tokenizer_of(source)
    config = model.config.get_text_config()
    starts = (tokenizer.bos_token_id, tokenizer.eos_token_id, config.bos_token_id, config.eos_token_id, 0)
    start = next(token for token in starts if isinstance(token, int))  # before a text of no tokens
    with _quiet():
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=evaluation.batch_size, prefix_token_id=start)
        answers: Mapping[str, Any] | None = simple_evaluate(
            model=harness,
            tasks=list(evaluation.tasks),
            limit=evaluation.task_limit,
            task_manager=_manager(evaluation),
            log_samples=False,
        )
    assert answers is not None  # so it is for processes other than the first
    return answers


def _manager(evaluation: Evaluation) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=evaluation.task_path)


def _near(name: str, known: list[str]) -> str:
    told = suggestion(name, known)
    return told if told.startswith("did") else f"it knows {len(known):,}: see `lm_eval --tasks list`"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's own bars and log lines off the terminal."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(before)
