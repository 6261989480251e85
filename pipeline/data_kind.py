"""What a model's evaluation data are taken for: a text of tokens, labelled examples, or texts to be embedded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from modelzip.checkpoints.errors import RecipeError
from modelzip.recipes.schema import Evaluation

from .labelled import TEXTS
from .progress import Progress
from .rows import read_table

Kind: TypeAlias = Literal["tokens", "classification", "similarity"]
HEAD: Final = "ForSequenceClassification"
HEADLESS: Final = "Model"


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model with classes for whole texts."""
    return any(str(name).endswith(HEAD) for name in config.get("architectures") or ())


def is_headless(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model whose hidden states are all it gives."""
    return any(str(name).endswith(HEADLESS) for name in config.get("architectures") or ())


def writes(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model that goes on with a text."""
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in config.get("architectures") or ())


def kind_of(evaluation: Evaluation, config: Mapping[str, Any]) -> Kind:
    """How a model of this config.json is to be evaluated. Raises RecipeError if it can't be as it was asked."""
    named = ", ".join(config.get("architectures") or ()) or "of no named architecture"
    if evaluation.task == "classification" and not is_classifier(config):
        raise RecipeError(
            f"evaluate.task is classification, but the model is {named}, which has no classes: take one that ends in "
            f"{HEAD}, or leave the task out."
        )
    if evaluation.task == "similarity" and not is_headless(config):
        raise RecipeError(
            f"evaluate.task is similarity, but the model is {named}, and embeddings are the hidden states of a model "
            "without a head: take one that ends in Model, or leave the task out."
        )
    if evaluation.task != "auto":
        return evaluation.task
    if evaluation.data is None or not _is_table(evaluation):
        return "tokens"
    return "classification" if is_classifier(config) else "similarity" if is_headless(config) else "tokens"


def columns_of(evaluation: Evaluation) -> dict[str, Any]:
    """The split and the columns that were named, as `labelled` takes them."""
    named = {"text": evaluation.text, "pair": evaluation.pair, "label": evaluation.label}
    return {"split": evaluation.split} | {key: value or "" for key, value in named.items()}


def _is_table(evaluation: Evaluation) -> bool:
    """Whether the data look like examples: by their kind, by the columns that are named or there."""
    assert evaluation.data is not None
    kind = Path(evaluation.data).suffix
    if evaluation.text or evaluation.pair or evaluation.label or kind in (".tsv", ".csv"):
        return True
    if kind in (".txt", ".md", ".json"):
        return False
    columns = set(read_table(evaluation.data, split=evaluation.split).columns)
    pairs = [{one, other} for one, other in TEXTS if other]
    return bool({"label", "labels", "class"} & columns) or any(pair <= columns for pair in pairs)


@dataclass
class Counted:
    """Tells how many examples are done, over all models."""

    progress: Progress
    total: int
    done: int = 0

    def __call__(self, more: int) -> None:
        self.done += more
        self.progress.step("evaluate", self.done, self.total)
