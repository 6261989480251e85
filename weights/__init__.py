"""Compressed weights. Importing this package teaches `AutoModel.from_pretrained` to open modelzip's own layout."""

from __future__ import annotations

from .affine import Affine
from .linear import CompressedLinear
from .plugin import ModelzipConfig, ModelzipQuantizer

__all__ = ["Affine", "CompressedLinear", "ModelzipConfig", "ModelzipQuantizer"]
