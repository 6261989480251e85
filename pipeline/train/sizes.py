"""What a `student_config` may change: how large the teacher's config.json makes a model, not what model it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from modelzip.checkpoints.blocks import find_structure
from modelzip.checkpoints.errors import CheckpointError
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.skeleton import skeleton

from ..calibrate import tokenizer_of
from ..tokens import vocabulary_size
from .student import Student, is_classifier

KIND: Final = frozenset(
    {
        *("model_type", "architectures", "auto_map", "quantization_config", "transformers_version"),
        *("is_decoder", "is_encoder_decoder", "dtype", "torch_dtype"),
        *("id2label", "label2id", "num_labels", "problem_type"),
    }
)
"""What config.json says beside sizes: the weights and the classes are as the teacher has them."""


def with_sizes(teacher: Checkpoint, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's config with these changes. Raises CheckpointError if that is no model of its kind."""
    for key in sizes:
        if key in KIND:
            raise CheckpointError(f"student_config names {key}, which is no size of a model: leave it out.")
        if key not in teacher.config:
            raise CheckpointError(f"student_config names {key}, which config.json of {teacher.source} hasn't got.")
    config = {**teacher.config, **sizes}
    told = "with student_config's " + ", ".join(f"{key}={value}" for key, value in sizes.items())
    try:
        planned = Student(config, teacher, "random").checkpoint()
        model = skeleton(planned)
        find_structure(model, planned)
    except CheckpointError as error:
        raise CheckpointError(f"{told}, {error}".removesuffix(".") + ": give other sizes.") from None
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise CheckpointError(f"{told}, nothing is left of {name}: give larger sizes.")
    _check_vocabulary(teacher, config)
    return config


def _check_vocabulary(teacher: Checkpoint, config: Mapping[str, Any]) -> None:
    """The student reads the teacher's tokens, and predicts the same if it predicts any."""
    mine, theirs = (vocabulary_size(one) for one in (config, teacher.config))
    if mine is None or theirs is None or mine == theirs:
        return
    if not is_classifier(config):
        raise CheckpointError(
            f"student_config's vocab_size is {mine}, and {teacher.source} predicts {theirs} tokens: leave it out."
        )
    if mine < (least := max(tokenizer_of(teacher).get_vocab().values()) + 1):
        raise CheckpointError(
            f"student_config's vocab_size is {mine}, and the tokenizer of {teacher.source} has {least} tokens: give at "
            "least as many."
        )
