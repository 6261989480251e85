"""A classifier that may stop early: a small classifier after each layer, and samples that leave once one is sure.

Liu et al. 2020, "FastBERT: a Self-distilling BERT with Adaptive Inference Time".
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.generic import ModelOutput

from .departures import Departures, EverybodyLeftError


class ExitsConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """base: the configuration of the classifier inside. exit_size, exit_heads: of the classifiers after each layer, 128
    and 2 in the paper's code. speed: the uncertainty below which a sample leaves, 0 ... 1, where none is asked for.
    """

    model_type: ClassVar[str] = "modelzip-exits"
    sub_configs: ClassVar[dict[str, type]] = {"base": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["layers", "exit_logits"]

    base: dict[str, Any] | PreTrainedConfig | None = None
    exit_size: int = 128
    exit_heads: int = 2
    speed: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.base, dict):
            options = dict(self.base)
            self.base = AutoConfig.for_model(options.pop("model_type"), **options)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def _of_base(self, name: str) -> Any:
        return getattr(self.base, name)

    @property
    def vocab_size(self) -> int:
        """Of the classifier inside, as are the properties below."""
        return int(self._of_base("vocab_size"))

    @property
    def hidden_size(self) -> int:
        return int(self._of_base("hidden_size"))

    @property
    def num_hidden_layers(self) -> int:
        return int(self._of_base("num_hidden_layers"))

    @property
    def max_position_embeddings(self) -> int:
        return int(self._of_base("max_position_embeddings"))


@dataclass
class ExitsOutput(ModelOutput):
    """logits: [batch, classes] of the exit that each sample took. layers: int64 [batch], layers run for each sample.
    exit_logits: [batch, classes] of every exit but the last; while training only. loss: if labels were given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    layers: Tensor | None = None
    exit_logits: tuple[Tensor, ...] | None = None


class ExitClassifier(nn.Module):
    """Narrow, attend, dense, classes: the student classifier of the paper's section 3.1.

    Only the first token's attention is computed, since only its output is read.
    """

    def __init__(self, width: int, size: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.narrow = nn.Linear(width, size)
        self.query, self.key, self.value, self.output = (nn.Linear(size, size) for _ in range(4))
        self.dense = nn.Linear(size, size)
        self.classifier = nn.Linear(size, classes)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden [batch, length, width], mask bool [batch, length] or None -> logits [batch, classes]"""
        hidden = torch.tanh(self.narrow(hidden))
        batch, length, size = hidden.shape
        query = self.query(hidden[:, :1]).view(batch, 1, self.heads, -1).transpose(1, 2)
        key, value = (
            part(hidden).view(batch, length, self.heads, -1).transpose(1, 2) for part in (self.key, self.value)
        )
        seen = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        first = self.output(attended.transpose(1, 2).reshape(batch, size))
        logits: Tensor = self.classifier(torch.tanh(self.dense(first)))
        return logits


class ExitsForSequenceClassification(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A fine-tuned encoder with its own classifier, which is the teacher, and an exit after each layer but the last.

    The encoder is fine-tuned before (the paper's step 1). Training this model trains the exits alone (step 2): the
    encoder stays as it is, without dropout and without gradients, and `exit_logits` are to be drawn to `logits`.
    The paper gives the teacher a classifier of the exits' own kind; here it is the encoder's own, so that at speed 0
    the logits are those of the model that came in, bit for bit.
    """

    config_class = ExitsConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    _supports_sdpa = True
    config: ExitsConfig

    def __init__(self, config: ExitsConfig) -> None:
        super().__init__(config)
        self.base = AutoModelForSequenceClassification.from_config(config.base)  # type: ignore[no-untyped-call]
        sizes = config.hidden_size, config.exit_size, config.exit_heads, config.num_labels or 2
        self.exits = nn.ModuleList(ExitClassifier(*sizes) for _ in range(config.num_hidden_layers - 1))
        self.post_init()  # type: ignore[no-untyped-call]
        self.train(self.training)

    @classmethod
    def from_classifier(cls, base: PreTrainedModel, *, exit_size: int = 128, exit_heads: int = 2) -> Self:
        """`base` with new exits after its layers, drawn from torch's generator. `base` becomes a part of it.

        Raises ValueError if it isn't an encoder with at least two layers in one list and at least two classes.
        """
        if (base.config.num_labels or 2) < 2:
            raise ValueError("a model with a single output has no uncertainty by which samples could leave early")
        if base.config.num_hidden_layers < 2:
            raise ValueError("a model of a single layer has no earlier layer to leave after")
        if exit_size % exit_heads:
            raise ValueError(f"exit_size {exit_size} can't be split into {exit_heads} heads")
        _layers(base)
        config = ExitsConfig(
            base=base.config.to_dict(),
            exit_size=exit_size,
            exit_heads=exit_heads,
            problem_type="single_label_classification",
            id2label=base.config.id2label,
            label2id=base.config.label2id,
        )
        with torch.device(base.device):
            model = cls(config)
        model.base = base
        model.exits.to(base.dtype)
        return model.train(base.training)

    def train(self, mode: bool = True) -> Self:
        """The encoder always stays in evaluation mode, and never learns."""
        super().train(mode)
        self.base.eval().requires_grad_(False)
        return self

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.base.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        speed: float | None = None,
        **inputs: Any,
    ) -> ExitsOutput:
        """input_ids [batch, length] -> logits and layers of each sample.

        speed: a sample leaves after the first layer whose exit is less uncertain than this; 0: never, 1: after the
        first layer; None: as config.json says. While training, every sample runs through all layers, the exits' logits
        come too, and the loss is left to the caller: `self_distillation(exit_logits, logits)`. Texts are padded on the
        right, since the exits read the first token.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs, "return_dict": True}
        if self.training:
            return self._all_exits(inputs)
        logits, layers = self._adaptive(inputs, self.config.speed if speed is None else speed)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ExitsOutput(loss=loss, logits=logits, layers=layers)

    def _all_exits(self, inputs: Mapping[str, Any]) -> ExitsOutput:
        with torch.no_grad():
            output = self.base(**inputs, output_hidden_states=True)
        mask = _mask(inputs)
        said = zip(self.exits, output.hidden_states[1:-1], strict=True)
        layers = torch.full((len(output.logits),), self.config.num_hidden_layers, device=output.logits.device)
        exit_logits = tuple(exit_(hidden, mask) for exit_, hidden in said)
        return ExitsOutput(logits=output.logits, layers=layers, exit_logits=exit_logits)

    @torch.no_grad()
    def every_exit(self, **inputs: Any) -> tuple[Tensor, ...]:
        """Logits [batch, classes] of every exit and of the whole model last, which `exits_taken` makes a curve of."""
        output = self._all_exits({**inputs, "return_dict": True})
        assert output.exit_logits is not None
        assert output.logits is not None
        return (*output.exit_logits, output.logits)

    def _adaptive(self, inputs: Mapping[str, Any], speed: float) -> tuple[Tensor, Tensor]:
        if speed <= 0:
            logits: Tensor = self.base(**inputs).logits
            return logits, torch.full((len(logits),), self.config.num_hidden_layers, device=logits.device)
        given = inputs["input_ids"] if inputs["input_ids"] is not None else inputs["inputs_embeds"]
        departures = Departures(len(given), speed, _mask(inputs))
        with departures.attached(_layers(self.base), self.exits), suppress(EverybodyLeftError):
            departures.finish(self.base(**inputs).logits, self.config.num_hidden_layers)
        return departures.logits, departures.layers


def _layers(base: PreTrainedModel) -> nn.ModuleList:
    """The list of the encoder's layers, wherever the family keeps it."""
    count = base.config.num_hidden_layers
    found = [part for part in base.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if len(found) != 1:
        raise ValueError(
            f"{type(base).__name__} has {len(found)} lists of {count} layers, so it isn't known where to leave: "
            "take an encoder such as BERT, RoBERTa or DistilBERT"
        )
    return found[0]


def _mask(inputs: Mapping[str, Any]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.bool()
