"""A student that isn't a transformer: a bidirectional LSTM that classifies texts, with its teacher's tokenizer.

Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks", section 3.1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import PreTrainedModel, initialization
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput


class BiLstmConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes of the student. embedding_size: of a token's vector; hidden_size: of each direction's state; inner_size: of
    the layer in front of the classes; dropout: before and after that layer while training.

    The paper takes 300, 150 or 300, and 200 or 400. With a vocabulary of wordpieces, nearly all weights are in the
    embedding, so that its size decides how small the student is.
    """

    model_type: ClassVar[str] = "modelzip-bilstm"

    vocab_size: int = 30522
    embedding_size: int = 50
    hidden_size: int = 150
    inner_size: int = 200
    dropout: float = 0.1
    pad_token_id: int | None = 0


class BiLstmForSequenceClassification(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Embedding, one bidirectional LSTM, the last states of both directions, a ReLU layer, the classes' logits.

    A pair of texts is read as one sequence, as the teacher reads it; the paper's siamese network for pairs isn't built.
    """

    config_class = BiLstmConfig
    base_model_prefix = "bilstm"
    main_input_name = "input_ids"
    config: BiLstmConfig

    def __init__(self, config: BiLstmConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.embedding_size)
        self.lstm = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(config.dropout)
        self.inner = nn.Linear(2 * config.hidden_size, config.inner_size)
        self.classifier = nn.Linear(config.inner_size, config.num_labels or 2)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value  # type: ignore[assignment]

    def _init_weights(self, module: nn.Module) -> None:
        """Weights on the scale of their inputs; transformers' 0.02 is made for layers with norms between them."""
        if isinstance(module, nn.Embedding):
            initialization.normal_(module.weight, std=0.1)
        elif isinstance(module, nn.Linear | nn.LSTM):
            for name, parameter in module.named_parameters(recurse=False):
                if "bias" in name:
                    initialization.zeros_(parameter)
                else:
                    initialization.xavier_uniform_(parameter)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """input_ids [batch, length] -> logits [batch, classes].

        attention_mask: [batch, length], 0 where a token is padding, on whichever side; None if there is none. What
        else a tokenizer gives (token types) isn't looked at. labels: [batch], for the loss.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        real = attention_mask.bool()
        front = (~real).to(torch.uint8).argsort(dim=1, stable=True)  # the real tokens in front, in their order
        vectors = self.embedding(input_ids.gather(1, front))
        lengths = real.sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)  # last: [2, batch, hidden], of the last token and of the first
        states = torch.cat([last[0], last[1]], -1)
        inner = torch.relu(self.inner(self.dropout(states)))
        logits = self.classifier(self.dropout(inner))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def embedding_start(teacher: Tensor, size: int) -> Tensor:
    """Coordinates [vocabulary, size] of a teacher's embedding [vocabulary, width] along its largest principal axes.

    No other linear map to so few numbers keeps the distances between tokens better (Eckart & Young 1936, of the
    embedding less its mean, which tells no token from another). Raises ValueError if size is more than the width.
    """
    if size > teacher.shape[1]:
        raise ValueError(f"an embedding of {size} can't be had from a teacher's of {teacher.shape[1]}: make it smaller")
    centred = teacher.double() - teacher.double().mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)  # ascending
    coordinates: Tensor = centred @ axes[:, -size:].flip(1)
    return coordinates.to(teacher.dtype)
