"""The settings of the pruning methods that need training: when weights go, and what decides it. No torch here."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from modelzip.compressors.distill.settings import TaughtSettings


class PruneTrainingSettings(TaughtSettings):
    """What all methods share that set weights to zero while a model is trained."""

    sparsity: float = Field(default=0.5, gt=0, lt=1, description="Share of the weights that are zero in the end.")

    @model_validator(mode="after")
    def _a_teacher_teaches(self) -> Self:
        """Refuse what only a teacher needs; a recipe with every default written out says `teacher: null` as well."""
        fields, given = type(self).model_fields, self.model_fields_set
        for name in ("alpha", "temperature"):
            is_default = getattr(self, name) == fields[name].default
            if self.teacher is None and name in given and not (is_default and "teacher" in given):
                raise ValueError(f"{name} says how a teacher is learned from: name a teacher, or leave it out")
        return self

    @property
    def label(self) -> str:
        """Method and sparsity, such as movement-90."""
        return f"{self.method}-{100 * self.sparsity:g}"


class ScheduledSettings(PruneTrainingSettings):
    """What methods share whose sparsity grows over the steps of one training."""

    begin: float = Field(default=0.1, ge=0, lt=1, description="Share of the steps after which sparsity begins to grow.")
    end: float = Field(
        default=0.7, gt=0, le=1, description="Share of the steps after which it no longer grows and the rest heals."
    )
    initial_sparsity: float = Field(default=0.0, ge=0, lt=1, description="Sparsity from which it grows.")
    prune_every: int = Field(default=10, ge=1, description="Steps between two changes of the sparsity.")

    @model_validator(mode="after")
    def _sparsity_grows(self) -> Self:
        if self.end < self.begin:
            raise ValueError(f"end ({self.end}) must not be less than begin ({self.begin})")
        if self.initial_sparsity > self.sparsity:
            raise ValueError(
                f"initial_sparsity ({self.initial_sparsity}) must not be more than sparsity ({self.sparsity})"
            )
        return self


class GradualMagnitude(ScheduledSettings):
    """The smallest weights become zero, more of them as training goes on."""

    summary: ClassVar[str] = "Set the smallest weights to zero, more and more of them while the model trains."
    citation: ClassVar[str] = 'Zhu & Gupta 2017, "To prune, or not to prune", equation 1'
    example: ClassVar[str] = "- prune: {method: gradual-magnitude, sparsity: 0.7, data: train.tsv}"

    method: Literal["gradual-magnitude"] = Field(default="gradual-magnitude", description="Name of the method.")
    scope: Literal["local", "global"] = Field(
        default="local", description="Where weights are compared; local: in each matrix, global: over all of them."
    )


class Movement(ScheduledSettings):
    """Weights that training moves towards zero are pruned."""

    summary: ClassVar[str] = "Learn a score for each weight while the model trains, and prune those that move to zero."
    citation: ClassVar[str] = 'Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning"'
    example: ClassVar[str] = "- prune: {method: movement, sparsity: 0.85, data: train.tsv, epochs: 6}"

    method: Literal["movement"] = Field(default="movement", description="Name of the method.")
    masking: Literal["top", "threshold"] = Field(
        default="top",
        description="Which weights stay; top: the share with the highest scores, so that sparsity is met exactly; "
        "threshold: those above it (soft movement), so that penalty decides how many.",
    )
    threshold: float = Field(default=0.0, description="Score above which a weight stays, with masking: threshold.")
    penalty: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the mean sigmoid of the scores in the loss, with masking: threshold; it rises from 0 "
        "between begin and end.",
    )
    score_rate: float = Field(default=1e-2, gt=0, le=10, description="Learning rate of the scores.")

    @model_validator(mode="after")
    def _penalty_belongs_to_a_threshold(self) -> Self:
        if self.masking == "top" and (self.penalty or self.threshold):
            name = "penalty" if self.penalty else "threshold"
            raise ValueError(f"{name} needs masking: threshold; with masking: top, sparsity says how many weights go")
        if self.masking == "threshold" and not self.penalty:
            raise ValueError("masking: threshold prunes nothing without a penalty: give one")
        if self.masking == "threshold" and self.sparsity != type(self).model_fields["sparsity"].default:
            raise ValueError("with masking: threshold, penalty decides how many weights go: leave sparsity out")
        return self

    @property
    def label(self) -> str:
        """Method and sparsity, where that is what was asked for."""
        return super().label if self.masking == "top" else f"{self.method}-soft"


class Lottery(PruneTrainingSettings):
    """The winning ticket: train, prune the smallest, put the rest back to the start, and again."""

    summary: ClassVar[str] = "Train, prune and rewind in rounds, and train what is left from its start once more."
    citation: ClassVar[str] = (
        'Frankle & Carbin 2019, "The Lottery Ticket Hypothesis"; Chen et al. 2020, "The Lottery Ticket Hypothesis for '
        'Pre-trained BERT Networks"'
    )
    example: ClassVar[str] = "- prune: {method: lottery, sparsity: 0.6, data: train.tsv, controls: [random, shuffled]}"

    method: Literal["lottery"] = Field(default="lottery", description="Name of the method.")
    round_share: float = Field(
        default=0.2, gt=0, lt=1, description="Share of the weights that are left which each round prunes."
    )
    rewind: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the steps, at least one, to which weights are put back; 0: to the very start.",
    )
    scope: Literal["local", "global"] = Field(
        default="global", description="Where weights are compared; local: in each matrix, global: over all of them."
    )
    controls: tuple[Literal["random", "reinit", "shuffled"], ...] = Field(
        default=(),
        description="Also trained and reported beside the ticket; random: a random mask of the same sparsity in each "
        "matrix; reinit: the mask over new random weights; shuffled: over the shuffled weights.",
        json_schema_extra={"allowed": "a list of random, reinit and shuffled"},
    )

    @model_validator(mode="after")
    def _controls_are_named_once(self) -> Self:
        if len(set(self.controls)) != len(self.controls):
            raise ValueError("controls are named once each")
        return self
