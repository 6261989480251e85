"""The settings of students that aren't a smaller copy of their teacher, and of learned grids. No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from modelzip.compressors.settings import GroupSize

from .settings import BASELINE, DistillSettings, PupilSettings, TaughtSettings


class BiLstm(PupilSettings):
    """A bidirectional LSTM learns what a classifier says."""

    summary: ClassVar[str] = "Train a small bidirectional LSTM on the logits of a classifier; the tokenizer stays."
    citation: ClassVar[str] = (
        'Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks"'
    )
    example: ClassVar[str] = "- distill: {method: bilstm, data: train.tsv, epochs: 10, learning_rate: 0.001}"

    method: Literal["bilstm"] = Field(default="bilstm", description="Name of the method.")
    learning_rate: float = Field(default=1e-3, gt=0, le=10, description="Learning rate at its peak.")
    embedding_size: int = Field(
        default=50, ge=1, description="Numbers a token; with a large vocabulary they are nearly all of the model."
    )
    hidden_size: int = Field(default=150, ge=1, description="Size of the LSTM's state in each direction.")
    inner_size: int = Field(default=200, ge=1, description="Size of the ReLU layer in front of the classes.")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout around the ReLU layer while training.")
    start: Literal["teacher", "random"] = Field(
        default="teacher", description="Embedding at the start; teacher: principal axes of the teacher's embedding."
    )
    objective: Literal["error", "divergence"] = Field(
        default="error",
        description="How logits are compared; error: squared distance, as in the paper; divergence: KL at temperature.",
    )
    temperature: float = Field(default=2.0, gt=0, le=100, description="Temperature of both softmaxes of a divergence.")
    alpha: float = Field(
        default=1.0, ge=0, le=1, description="Weight of the teacher against the labels; in the paper 1."
    )
    baseline: bool = Field(default=False, description=BASELINE)


class FastBert(DistillSettings):
    """Exits after each layer of a fine-tuned encoder learn what its last classifier says."""

    summary: ClassVar[str] = "Put a classifier after each layer, by which texts that are easy leave an encoder early."
    citation: ClassVar[str] = 'Liu et al. 2020, "FastBERT: a Self-distilling BERT with Adaptive Inference Time"'
    example: ClassVar[str] = "- distill: {method: fastbert, data: train.tsv, epochs: 5, speed: 0.5}"

    method: Literal["fastbert"] = Field(default="fastbert", description="Name of the method.")
    learning_rate: float = Field(default=5e-4, gt=0, le=10, description="Learning rate at its peak.")
    exit_size: int = Field(default=128, ge=1, description="Width of the classifiers after each layer.")
    exit_heads: int = Field(default=2, ge=1, description="Attention heads of each of them; must divide exit_size.")
    speed: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Uncertainty below which a text leaves when the model is used; 0: never, 1: after the first layer.",
    )
    divergence: Literal["forward", "reverse"] = Field(
        default="reverse",
        description="KL of the exit from the last classifier (forward, as in the authors' code), or of the last "
        "classifier from the exit (reverse, as in the paper).",
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.exit_size % self.exit_heads:
            raise ValueError(f"exit_heads ({self.exit_heads}) must divide exit_size ({self.exit_size})")
        return self


class Sequence(PupilSettings):
    """A language model learns from text that its teacher wrote."""

    summary: ClassVar[str] = "Train a language model on text that the teacher writes, as if it were real."
    citation: ClassVar[str] = 'Kim & Rush 2016, "Sequence-Level Knowledge Distillation"'
    example: ClassVar[str] = "- distill: {method: sequence, texts: 2000, text_length: 256}"

    method: Literal["sequence"] = Field(default="sequence", description="Name of the method.")
    texts: int = Field(default=1000, ge=1, description="Texts that the teacher writes.")
    text_length: int = Field(default=256, ge=2, description="Tokens of each of them.")
    prompt_length: int = Field(
        default=0,
        ge=0,
        description="Tokens of data that each text goes on from, which the student isn't trained on; 0: from nothing.",
    )
    sampling_temperature: float = Field(
        default=1.0, ge=0, le=10, description="Temperature at which the teacher draws tokens; 0: always the likeliest."
    )

    @model_validator(mode="after")
    def _prompts_come_from_somewhere(self) -> Self:
        if self.prompt_length and self.data is None:
            raise ValueError("prompt_length needs texts to take prompts from: give data as well")
        if self.prompt_length >= self.text_length:
            raise ValueError(f"prompt_length ({self.prompt_length}) must be less than text_length ({self.text_length})")
        return self


class Lsq(TaughtSettings):
    """Quantization-aware training with learned steps."""

    summary: ClassVar[str] = "Train with rounded weights and learn their grid; ends in the packed format of gptq."
    citation: ClassVar[str] = (
        'Esser et al. 2020, "Learned Step Size Quantization"; zero points: Bhalgat et al. 2020, "LSQ+"'
    )
    example: ClassVar[str] = "- distill: {method: lsq, data: train.tsv, bits: 2, group_size: 64, epochs: 1}"

    method: Literal["lsq"] = Field(default="lsq", description="Name of the method.")
    bits: int = Field(default=4, ge=2, le=8, description="Bits of one stored weight.")
    group_size: GroupSize = Field(
        default=128,
        description="Columns that share one scale; channel: one scale a row; tensor: one scale a matrix.",
    )
    symmetric: bool = Field(
        default=True,
        description="Grid symmetric around zero; off, every group also learns a zero point.",
        json_schema_extra={"negative": "asymmetric"},
    )
    start: Literal["mse", "mean"] = Field(
        default="mse",
        description="Steps at the start; mse: those of least squared error; mean: 2 ⟨|w|⟩ / √Qp, as in the paper.",
    )
    teacher: str | None = Field(
        default=None,
        min_length=1,
        description="The teacher, a folder or hub id; without one, the model as it came in, unless alpha is 0.",
    )
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="Weight of the teacher's logits against the labels; 0: labels alone."
    )
    temperature: float = Field(default=1.0, gt=0, le=100, description="Temperature of both softmaxes.")

    @model_validator(mode="after")
    def _start_fits(self) -> Self:
        if self.start == "mean" and not self.symmetric:
            raise ValueError("start: mean makes a symmetric grid: leave it out, or make the grid symmetric")
        return self

    @property
    def label(self) -> str:
        """Method and bits, such as lsq-4bit."""
        return f"{self.method}-{self.bits}bit"
