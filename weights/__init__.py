"""Compressed weights. Importing this package teaches `AutoModel.from_pretrained` to open modelzip's own layout and its
own models.
"""

from __future__ import annotations

from .affine import Affine
from .linear import CompressedLinear
from .plugin import ModelzipConfig, ModelzipQuantizer
from .students import BiLstmForSequenceClassification, ExitsForSequenceClassification

__all__ = [
    "Affine",
    "BiLstmForSequenceClassification",
    "CompressedLinear",
    "ExitsForSequenceClassification",
    "ModelzipConfig",
    "ModelzipQuantizer",
]
