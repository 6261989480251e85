"""The settings of the methods that train: ranges, defaults, citation and a sample stage. No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from modelzip.compressors.settings import Engine, MethodSettings


class DistillSettings(MethodSettings):
    """What all methods share that train a model."""

    engine: ClassVar[Engine] = "training"
    whole_stage: ClassVar[frozenset[str]] = frozenset()

    method: str = Field(description="Name of the method.")


class Labels(DistillSettings):
    """Plain fine-tuning on labels."""

    summary: ClassVar[str] = "Fine-tune the model on labelled data, without a teacher."
    citation: ClassVar[str] = 'Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers", section 4'
    example: ClassVar[str] = "- distill: {method: labels}"

    method: Literal["labels"] = Field(default="labels", description="Name of the method.")
