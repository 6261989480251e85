"""Compressed weights. Importing this package teaches `AutoModel.from_pretrained` to open modelzip's own layout."""

from __future__ import annotations

from .affine import Affine
from .dense import Dense
from .embedding import CompressedEmbedding
from .kronecker import Kronecker
from .linear import CompressedLinear
from .low_rank import LowRank
from .plugin import ModelzipConfig, ModelzipQuantizer
from .sparse import Sparse
from .tensor_train import TensorTrain
from .value import CompressedWeight

__all__ = [
    "Affine",
    "CompressedEmbedding",
    "CompressedLinear",
    "CompressedWeight",
    "Dense",
    "Kronecker",
    "LowRank",
    "ModelzipConfig",
    "ModelzipQuantizer",
    "Sparse",
    "TensorTrain",
]
