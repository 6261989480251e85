"""How many bits a matrix gets: a number for all, or what a target leaves, chosen for each. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import Field, model_validator

from modelzip.compressors.settings import SIZE_PATTERN, SIZE_WORDS, GroupSettings, size_in_bytes

TARGETS: Final = ("target_bits", "target_size", "max_kl")
"""The settings of which one may take the place of `bits`."""
BITS: Final = 4


class BudgetSettings(GroupSettings):
    """Bits, or a target in their place. `candidates` are the bits that a target's matrices may get."""

    whole_stage: ClassVar[frozenset[str]] = frozenset(
        {"method", "layout", "propagate", "embeddings", "rotate", "kv_cache", "candidates", *TARGETS}
    )
    alternatives: ClassVar[tuple[str, ...]] = ("bits", *TARGETS)

    bits: int = Field(default=BITS, ge=2, le=8, description="Bits of one stored weight.")
    target_bits: Annotated[float, Field(gt=0, le=16)] | None = Field(
        default=None,
        description="In place of bits: bits a weight, scales counted, over all matrices together. Each gets as many as "
        "serve the model best, by what was measured on the calibration text.",
    )
    target_size: str | None = Field(
        default=None,
        pattern=SIZE_PATTERN,
        description="In place of bits: what the whole model may weigh; shared out in the same way.",
        json_schema_extra={"allowed": SIZE_WORDS},
    )
    max_kl: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="In place of bits: the KL divergence in nats a token that the result may have from the original; "
        "the smallest model that is expected to keep to it.",
    )
    candidates: tuple[Annotated[int, Field(ge=2, le=8)], ...] = Field(
        default=(2, 3, 4, 5, 6, 8),
        min_length=2,
        description="Bits that a matrix may get where a target is given.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_target(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        given = [name for name in TARGETS if data.get(name) is not None]
        if given and data.get("bits") not in (None, cls.model_fields["bits"].default):
            given.insert(0, "bits")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} each say how many bits there are; keep one of them")
        return data

    @model_validator(mode="after")
    def _candidates_rise(self) -> Self:
        if list(self.candidates) != sorted(set(self.candidates)):
            raise ValueError(f"candidates rise, each once: {', '.join(map(str, sorted(set(self.candidates))))}")
        if not self.is_open and self.candidates != type(self).model_fields["candidates"].default:
            raise ValueError(f"candidates do nothing without one of {', '.join(TARGETS)}")
        return self

    @classmethod
    def overlaid(cls, data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """As for all settings; a number of bits also takes the candidates' place."""
        found = super().overlaid(data, overrides)
        if overrides.get("bits") is not None:
            found.pop("candidates", None)
        return found

    @property
    def is_open(self) -> bool:
        """Whether the bits of each matrix are still to be chosen."""
        return any(getattr(self, name) is not None for name in TARGETS)

    @property
    def target_bytes(self) -> int | None:
        """What `target_size` says, in bytes."""
        return None if self.target_size is None else size_in_bytes(self.target_size)

    def at_bits(self, bits: int) -> Self:
        """These settings with the bits that were chosen in place of the target."""
        default = type(self).model_fields["candidates"].default
        return self.model_copy(update={"bits": bits, "candidates": default, **dict.fromkeys(TARGETS)})

    @property
    def label(self) -> str:
        """Method and bits, such as gptq-4bit."""
        return f"{self.method}-{self.asked}"

    @property
    def asked(self) -> str:
        """The bits or the target, as an output folder's name says it: 4bit, 3.5bit, 60MB, kl0.05."""
        if self.target_bits is not None:
            return f"{self.target_bits:g}bit"
        if self.target_size is not None:
            return self.target_size.replace(" ", "")
        return f"{self.bits}bit" if self.max_kl is None else f"kl{self.max_kl:g}"
