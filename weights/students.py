"""Teaches transformers' Auto classes the models of our own that a distillation may end in."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForSequenceClassification

from .bilstm import BiLstmConfig, BiLstmForSequenceClassification
from .exits import ExitsConfig, ExitsForSequenceClassification

__all__ = ["BiLstmForSequenceClassification", "ExitsForSequenceClassification"]

for _config, _model in (
    (BiLstmConfig, BiLstmForSequenceClassification),
    (ExitsConfig, ExitsForSequenceClassification),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForSequenceClassification.register(_config, _model, exist_ok=True)
