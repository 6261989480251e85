"""Teaches transformers' Auto classes the models of our own that a distillation may end in."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from .bilstm import BiLstmConfig, BiLstmForSequenceClassification
from .exits import ExitsConfig, ExitsForSequenceClassification

__all__ = ["OWN_MODELS", "BiLstmForSequenceClassification", "ExitsForSequenceClassification"]

OWN_MODELS: Final[Mapping[str, type[PreTrainedModel]]] = MappingProxyType(
    {
        BiLstmConfig.model_type: BiLstmForSequenceClassification,
        ExitsConfig.model_type: ExitsForSequenceClassification,
    }
)
"""The classes that transformers doesn't have, by model type. They have no blocks that could be streamed."""

for _config, _model in (
    (BiLstmConfig, BiLstmForSequenceClassification),
    (ExitsConfig, ExitsForSequenceClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForSequenceClassification.register(_config, _model, exist_ok=True)
