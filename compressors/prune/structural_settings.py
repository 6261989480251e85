"""The settings of the methods that leave a smaller ordinary model: heads, neurons, layers, tokens. No torch here."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from modelzip.compressors.settings import Engine, MethodSettings

Layer = Annotated[int, Field(ge=0)]
Loss = Literal["auto", "language-model", "masked-lm", "self"]
LOSS = (
    "What importance is measured by; language-model: predicting the next token; masked-lm: predicting masked tokens; "
    "self: the model's own predictions, drawn by chance; auto: the first of these that fits the model."
)


class StructuralSettings(MethodSettings):
    """What all methods share that take whole parts out of a model."""

    engine: ClassVar[Engine] = "structural"

    method: str = Field(description="Name of the method.")

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is needed."""
        return False

    @property
    def is_given(self) -> bool:
        """Whether the settings alone say what goes, and no weight is looked at."""
        return False


class UnitSettings(StructuralSettings):
    """What heads and neurons share."""

    share: float = Field(default=0.25, gt=0, lt=1, description="Share of the heads or neurons that is taken out.")
    scope: Literal["uniform", "global"] = Field(
        default="uniform",
        description="Where heads or neurons are compared; uniform: in each layer, of which as many go; global: in the "
        "whole model, but never all of a layer go.",
    )
    loss: Loss = Field(default="auto", description=LOSS)

    @property
    def label(self) -> str:
        """Method and share, such as heads-25."""
        return f"{self.method}-{100 * self.share:g}"


class Heads(UnitSettings):
    """The attention heads whose masking would change the loss least."""

    whole_stage: ClassVar[frozenset[str]] = frozenset({"method", "share", "scope", "loss", "grouped"})
    summary: ClassVar[str] = "Take out the attention heads that the loss depends on least."
    citation: ClassVar[str] = 'Michel et al. 2019, "Are Sixteen Heads Really Better than One?"'
    example: ClassVar[str] = "- prune: {method: heads, share: 0.3, scope: global}"

    method: Literal["heads"] = Field(default="heads", description="Name of the method.")
    grouped: Literal["heads", "groups"] = Field(
        default="heads",
        description="Where several query heads share a key and value head; heads: as many query heads from every such "
        "group, groups: whole groups with their key and value head.",
    )

    @property
    def needs_data(self) -> bool:
        """Gradients of the loss are taken on text."""
        return True


class Neurons(UnitSettings):
    """The neurons of the feed-forward that matter least."""

    whole_stage: ClassVar[frozenset[str]] = frozenset({"method", "share", "scope", "loss", "criterion", "multiple"})
    summary: ClassVar[str] = "Take out the neurons of the feed-forward that matter least."
    citation: ClassVar[str] = (
        'Michel et al. 2019, "Are Sixteen Heads Really Better than One?" (its gradient of a mask, on neurons)'
    )
    example: ClassVar[str] = "- prune: {method: neurons, share: 0.25, criterion: magnitude}"

    method: Literal["neurons"] = Field(default="neurons", description="Name of the method.")
    criterion: Literal["gradient", "magnitude"] = Field(
        default="gradient",
        description="Which neurons go; gradient: those whose masking changes the loss least; magnitude: those with the "
        "smallest product of the norms of their weights, which needs no data.",
    )
    multiple: int = Field(default=1, ge=1, description="The number of neurons kept is a multiple of this.")

    @property
    def needs_data(self) -> bool:
        """Gradients of the loss are taken on text, norms aren't."""
        return self.criterion == "gradient"


class Layers(StructuralSettings):
    """Whole layers."""

    whole_stage: ClassVar[frozenset[str]] = frozenset(
        {"method", "keep", "drop", "every", "count", "criterion", "loss", "stack"}
    )
    alternatives: ClassVar[tuple[str, ...]] = ("keep", "drop", "every", "count")
    summary: ClassVar[str] = "Take out whole layers: those named, every other one, or those that matter least."
    citation: ClassVar[str] = (
        'Sajjad et al. 2020, "On the Effect of Dropping Layers of Pre-trained Transformer Models"; '
        'Peer et al. 2022, "Greedy-layer Pruning"; '
        'Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect"'
    )
    example: ClassVar[str] = "- prune: {method: layers, count: 2, criterion: similarity}"

    method: Literal["layers"] = Field(default="layers", description="Name of the method.")
    keep: tuple[Layer, ...] = Field(
        default=(),
        description="Layers that stay, counted from 0.",
        json_schema_extra={"allowed": "a list of whole numbers"},
    )
    drop: tuple[Layer, ...] = Field(
        default=(),
        description="Layers that go, counted from 0.",
        json_schema_extra={"allowed": "a list of whole numbers"},
    )
    every: int | None = Field(
        default=None, ge=2, description="The last of every so many layers goes; 2: every other layer."
    )
    count: int | None = Field(default=None, ge=1, description="So many layers go, chosen by `criterion`.")
    criterion: Literal["similarity", "greedy"] = Field(
        default="similarity",
        description="Which layers go, with count; similarity: those whose output is most like their input; greedy: one "
        "after the other, that whose removal costs the least loss.",
    )
    loss: Loss = Field(default="auto", description=LOSS.replace("importance", "greedy's loss"))
    stack: Literal["encoder", "decoder"] | None = Field(
        default=None, description="Which layers, in a model with an encoder and a decoder."
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = {"keep": self.keep, "drop": self.drop, "every": self.every, "count": self.count}
        given = [name for name, value in ways.items() if value]
        if len(given) != 1:
            raise ValueError(f"give one of keep, drop, every and count, not {' and '.join(given) or 'none of them'}")
        return self

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> Self:
        """Refuse what only a choice by `count` needs; a recipe with every default written out says `count: null`."""
        given, is_greedy = self.model_fields_set, self.count is not None and self.criterion == "greedy"
        for name, is_used, use in (
            ("criterion", self.count is not None, "chooses the layers that go with count: give count"),
            ("loss", is_greedy, "is what the criterion greedy goes by: set that"),
        ):
            is_default = getattr(self, name) == type(self).model_fields[name].default
            if not is_used and name in given and not (is_default and "count" in given):
                raise ValueError(f"{name} {use}, or leave {name} out")
        return self

    @property
    def needs_data(self) -> bool:
        """Only a criterion looks at text."""
        return self.count is not None

    @property
    def is_given(self) -> bool:
        """Only a criterion looks at weights."""
        return self.count is None

    @property
    def label(self) -> str:
        """How many go where that is known, such as layers-2."""
        return f"{self.method}-{self.count}" if self.count else self.method


class Vocabulary(StructuralSettings):
    """Tokens that a corpus doesn't use."""

    whole_stage: ClassVar[frozenset[str]] = frozenset({"method", "corpus", "corpus_field", "min_count", "max_tokens"})
    summary: ClassVar[str] = "Take tokens that a corpus doesn't use out of the embedding and the tokenizer."
    citation: ClassVar[str] = 'Abdaoui et al. 2020, "Load What You Need: Smaller Versions of Multilingual BERT"'
    example: ClassVar[str] = "- prune: {method: vocabulary, corpus: data/train.txt, min_count: 2}"

    method: Literal["vocabulary"] = Field(default="vocabulary", description="Name of the method.")
    corpus: str = Field(min_length=1, description="Text that shows what is used: .txt, .jsonl, .parquet, .csv or .tsv.")
    corpus_field: str = Field(
        default="text", min_length=1, description="Field or column of the corpus that holds the text."
    )
    min_count: int = Field(default=1, ge=1, description="A token stays if the corpus has it so often.")
    max_tokens: int | None = Field(
        default=None, ge=1, description="So many tokens stay at most, the most frequent ones, beside special ones."
    )

    @property
    def is_given(self) -> bool:
        """The corpus says what goes, which is read for the plan."""
        return True
