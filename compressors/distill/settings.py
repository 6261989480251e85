"""The settings of the methods that train: ranges, defaults, citation and a sample stage. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from modelzip.compressors.settings import Engine, MethodSettings

BASELINE: Final = "Also train the same student on labels alone, and report its accuracy beside."
DATA: Final = "a .tsv, .csv, .jsonl, .parquet or .txt file, or a hub dataset as NAME or NAME:CONFIG"


class DistillSettings(MethodSettings):
    """What all methods share that train a model."""

    engine: ClassVar[Engine] = "training"
    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    method: str = Field(description="Name of the method.")
    data: str | None = Field(
        default=None,
        min_length=1,
        description="Training data: a table (.tsv, .csv, .jsonl, .parquet) or hub dataset with texts and labels,"
        " or plain text (.txt) for language modelling.",
        json_schema_extra={"allowed": DATA},
    )
    validation: str | None = Field(
        default=None,
        min_length=1,
        description="Data that the model is measured on while it trains; the same kinds of source as for data.",
        json_schema_extra={"allowed": DATA},
    )
    data_split: str = Field(default="train", min_length=1, description="Split of a hub dataset to learn from.")
    validation_split: str = Field(
        default="validation", min_length=1, description="Split of a hub dataset to measure on while learning."
    )
    text_column: str = Field(default="", description="Column that holds the text; without one, it is found by name.")
    pair_column: str = Field(default="", description="Column that holds a second text, for pairs.")
    label_column: str = Field(default="", description="Column that holds the label; without one, it is found by name.")
    task: Literal["auto", "classification", "language-modelling"] = Field(
        default="auto", description="What is learned; auto: what the model's head and the data say."
    )
    learning_rate: float = Field(default=5e-5, gt=0, le=10, description="Learning rate at its peak.")
    epochs: float = Field(default=3, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Steps of the optimizer; if given, it wins over epochs."
    )
    train_batch_size: int = Field(
        default=32, ge=1, description="Examples, or windows of text, in one forward pass of one process."
    )
    gradient_accumulation: int = Field(
        default=1, ge=1, description="Forward passes whose gradients are summed for one step."
    )
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the steps in which the learning rate rises from 0."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="How the learning rate falls after the warm-up; constant: it doesn't."
    )
    weight_decay: float = Field(
        default=0.01, ge=0, lt=1, description="Weight decay of AdamW; biases and norms have none."
    )
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Norm to which larger gradients are scaled down; 0: never."
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Tokens at which a text is cut, or of a window of text; without it 128, or what the model takes.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="Type of forward and backward passes; auto: bf16 on GPUs that have it, else fp32."
    )
    log_every: int = Field(default=50, ge=1, description="Steps between two points of the loss curve.")
    eval_every: int | None = Field(
        default=None, ge=1, description="Steps between two measurements; without it, after every epoch."
    )
    save_every: int = Field(default=500, ge=1, description="Steps after which a killed run can go on.")
    early_stopping: int | None = Field(
        default=None, ge=1, description="Stop when so many measurements in a row were no better than the best one."
    )
    keep: Literal["auto", "last", "loss", "accuracy"] = Field(
        default="auto",
        description="Weights of the result: the last, or those measured with the least loss or greatest accuracy; "
        "auto: least loss with early stopping, else the last.",
    )
    tensorboard: bool = Field(default=False, description="Also write the curves for TensorBoard, beside the output.")

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """A model is trained as a whole: no rule can change a setting for some modules."""
        super().__pydantic_init_subclass__(**kwargs)
        cls.whole_stage = frozenset(cls.model_fields)

    @property
    def kept(self) -> Literal["last", "loss", "accuracy"]:
        """Which weights are kept, once `auto` is decided."""
        if self.keep != "auto":
            return self.keep
        return "last" if self.early_stopping is None else "loss"

    @model_validator(mode="after")
    def _can_be_measured(self) -> Self:
        if self.validation is None and (self.early_stopping is not None or self.kept != "last"):
            name = "early_stopping" if self.early_stopping is not None else "keep"
            raise ValueError(f"{name} needs data to measure on: give validation as well")
        if self.early_stopping is not None and self.kept == "last":
            raise ValueError("early_stopping keeps the best weights: leave keep out, or make it loss or accuracy")
        return self


class TaughtSettings(DistillSettings):
    """What methods share that change a model while it is trained, and may learn from a teacher meanwhile.

    Labels are needed where there is no teacher.
    """

    needs_labels: ClassVar[bool] = True
    teacher: str | None = Field(
        default=None, min_length=1, description="The teacher, a folder or hub id; without one, labels or text alone."
    )
    temperature: float = Field(default=2.0, gt=0, le=100, description="Temperature of both softmaxes.")
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="Weight of the teacher against the labels; without labels it is 1."
    )


class Labels(DistillSettings):
    """Plain fine-tuning: on labels, or on text where there are none."""

    summary: ClassVar[str] = "Fine-tune the model on labelled data, or on text, without a teacher."
    citation: ClassVar[str] = 'Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers", section 4'
    needs_labels: ClassVar[bool] = True
    example: ClassVar[str] = "- distill: {method: labels, data: train.tsv, validation: dev.tsv, epochs: 3}"

    method: Literal["labels"] = Field(default="labels", description="Name of the method.")


class PupilSettings(DistillSettings):
    """What methods share whose student can't learn without a teacher."""

    needs_teacher: ClassVar[bool] = True
    teacher: str | None = Field(
        default=None,
        min_length=1,
        description="The teacher, a folder or hub id; without one, the model that the run began with.",
    )


class Logits(PupilSettings):
    """A teacher's logits are learned, beside the labels where there are any."""

    alternatives: ClassVar[tuple[str, ...]] = ("layers", "student_config")
    summary: ClassVar[str] = "Train the model, or a smaller one made from the teacher, on the teacher's logits."
    citation: ClassVar[str] = (
        'Hinton et al. 2015, "Distilling the Knowledge in a Neural Network"; students of some of the layers: '
        'Sanh et al. 2019, "DistilBERT, a distilled version of BERT"'
    )
    example: ClassVar[str] = "- distill: {method: logits, data: train.tsv, layers: [0, 2, 4], temperature: 2, alpha: 1}"

    method: Literal["logits"] = Field(default="logits", description="Name of the method.")
    layers: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="The student is the teacher with these of its layers, counted from 0; without layers and "
        "student_config, it is the model that came in.",
        json_schema_extra={"allowed": "a list of whole numbers"},
    )
    student_config: Mapping[str, int | float | str] | None = Field(
        default=None,
        min_length=1,
        description="The student is the teacher with these changes of its config.json, such as hidden_size: 128.",
    )
    start: Literal["random", "copy"] = Field(
        default="random",
        description="Weights that a student_config starts with; copy: the leading part of the teacher's.",
    )
    temperature: float = Field(default=2.0, gt=0, le=100, description="Temperature of both softmaxes.")
    alpha: float = Field(
        default=0.5, ge=0, le=1, description="Weight of the teacher against the labels; without labels it is 1."
    )
    divergence: Literal["forward", "reverse"] = Field(
        default="forward",
        description="Which KL is made small; forward: KL(teacher ‖ student), reverse: KL(student ‖ teacher).",
    )
    signals: Mapping[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="More that is learned from the teacher, each with its weight, such as hidden: 1.",
        json_schema_extra={"allowed": "names of signals, each with a weight above 0"},
    )
    layer_map: Literal["uniform", "last"] | tuple[int, ...] = Field(
        default="uniform",
        description="Teacher layers that the student's layers learn from in signals; uniform: spread evenly, last: "
        "the last ones, or a list counted from 1.",
        json_schema_extra={"allowed": "uniform, last or a list of whole numbers"},
    )

    cache: str | None = Field(
        default=None,
        min_length=1,
        description="Folder for the teacher's largest logits, so that it runs once and later runs don't load it; auto: "
        "modelzip's own cache. Log-probabilities are rounded to 16 bits.",
        json_schema_extra={"allowed": "a folder, auto or true"},
    )
    top_k: int | None = Field(
        default=None, ge=1, description="Logits of each token that a cache keeps; without it 64, or all if fewer."
    )
    baseline: bool = Field(default=False, description=BASELINE)

    @field_validator("cache", mode="before")
    @classmethod
    def _is_wanted(cls, value: Any) -> Any:
        """A switch stands for modelzip's own cache."""
        return {True: "auto", False: None}[value] if isinstance(value, bool) else "auto" if value == "true" else value

    @model_validator(mode="after")
    def _cache_is_enough(self) -> Self:
        if self.cache is not None and self.signals:
            raise ValueError("cache keeps logits alone, and signals look inside the teacher: leave one of them out")
        if self.top_k is not None and self.cache is None:
            raise ValueError("top_k says how much a cache keeps: give cache as well")
        return self

    @model_validator(mode="after")
    def _one_student(self) -> Self:
        if self.layers is not None and self.student_config is not None:
            raise ValueError("layers and student_config are two students: give one of them")
        if self.layers is not None and (len(set(self.layers)) != len(self.layers) or min(self.layers) < 0):
            raise ValueError("layers are counted from 0, each once")
        if self.start == "copy" and self.student_config is None:
            raise ValueError("start says how a student_config begins: give one, or leave start out")
        return self
