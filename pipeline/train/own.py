"""Students of our own kinds: what their config.json says, and what their weights start from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.compressors.distill.settings_students import BiLstm, FastBert
from modelzip.weights.bilstm import BiLstmConfig, BiLstmForSequenceClassification, embedding_start
from modelzip.weights.exits import ExitsConfig, ExitsForSequenceClassification


def bilstm_config(settings: BiLstm, teacher: Checkpoint, names: Sequence[str], padding: int | None) -> dict[str, Any]:
    """config.json of an LSTM with the teacher's tokens and classes. names: of them, empty for a number.

    Raises CheckpointError if its embedding can't be had from the teacher's.
    """
    table = skeleton(teacher).get_input_embeddings().get_parameter("weight")
    if settings.start == "teacher" and settings.embedding_size > table.shape[1]:
        raise CheckpointError(
            f"an embedding of {settings.embedding_size} can't start from the teacher's of {table.shape[1]}: make "
            "embedding_size smaller, or take start: random."
        )
    return {
        "architectures": [BiLstmForSequenceClassification.__name__],
        "model_type": BiLstmConfig.model_type,
        "vocab_size": table.shape[0],
        "embedding_size": settings.embedding_size,
        "hidden_size": settings.hidden_size,
        "inner_size": settings.inner_size,
        "dropout": settings.dropout,
        "pad_token_id": padding,
        **_classes(names),
        **_dtype(teacher),
    }


def exits_config(settings: FastBert, source: Checkpoint, names: Sequence[str], padding: int | None) -> dict[str, Any]:
    """config.json of a classifier with exits. names: its classes.

    Raises CheckpointError if the source isn't an encoder of several layers with several classes.
    """
    model = skeleton(source)
    if type(model.config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise CheckpointError(
            f"{source.source} is a {type(model).__name__}, and exits read the first token, which says something only "
            "in an encoder: take one such as BERT, RoBERTa or DistilBERT."
        )
    try:
        sizes = {"exit_size": settings.exit_size, "exit_heads": settings.exit_heads}
        ExitsForSequenceClassification.from_classifier(model, **sizes)
    except ValueError as error:
        raise CheckpointError(f"{source.source} can't have exits: {error}.") from None
    left_out = ("quantization_config", "dtype", "torch_dtype")
    return {
        "architectures": [ExitsForSequenceClassification.__name__],
        "model_type": ExitsConfig.model_type,
        "base": {key: value for key, value in source.config.items() if key not in left_out},
        **sizes,
        "speed": settings.speed,
        "pad_token_id": padding,
        **_classes(names),
        **_dtype(source),
    }


def _classes(names: Sequence[str]) -> dict[str, Any]:
    shown = list(names) or ["LABEL_0"]
    return {
        "id2label": {str(place): name for place, name in enumerate(shown)},
        "label2id": {name: place for place, name in enumerate(shown)},
        "problem_type": "single_label_classification" if names else "regression",
    }


def _dtype(source: Checkpoint) -> dict[str, Any]:
    """What transformers opens it in, if the source says so."""
    return {key: source.config[key] for key in ("dtype", "torch_dtype") if key in source.config}


def fill_embedding(made: Any, teacher: Any) -> None:
    """Start an LSTM's embedding with the principal axes of its teacher's."""
    table = teacher.get_input_embeddings().weight
    with torch.no_grad():
        made.embedding.weight.copy_(embedding_start(table, made.config.embedding_size))


def fill_base(made: Any, base: Any) -> None:
    """Put the classifier that came in into the model with exits."""
    made.base.load_state_dict(base.state_dict())
