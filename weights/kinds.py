"""The family: every kind of compressed weight by the name that it has in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor

from .affine import Affine
from .bilevel import Bilevel
from .codebook import Codebook
from .dense import Dense
from .float import Float
from .int8 import Int8
from .kronecker import Kronecker
from .low_rank import LowRank
from .mixed_columns import MixedColumns
from .rounded_inputs import RoundedInputs
from .sparse import Sparse
from .tensor_train import TensorTrain
from .value import CompressedWeight
from .vector_codebook import VectorCodebook
from .with_outliers import WithOutliers

KINDS: Final[Mapping[str, type[CompressedWeight]]] = MappingProxyType(
    {
        kind.kind: kind
        for kind in (
            *(Affine, Bilevel, Codebook, Dense, Float, Int8, Kronecker, LowRank, Sparse, TensorTrain),
            *(MixedColumns, RoundedInputs, VectorCodebook, WithOutliers),
        )
    }
)


def from_tensors(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> CompressedWeight:
    """The weight of meta["kind"] over these tensors. Raises KeyError if one is missing, ValueError for other kinds."""
    return _kind(meta).from_tensors(tensors, meta)


def empty(meta: Mapping[str, Any]) -> CompressedWeight:
    """A weight of meta["kind"] on the meta device. Raises ValueError for other kinds."""
    return _kind(meta).empty(meta)


def _kind(meta: Mapping[str, Any]) -> type[CompressedWeight]:
    if meta["kind"] not in KINDS:
        raise ValueError(f"a weight of kind {meta['kind']!r}; installed are {', '.join(KINDS)}")
    return KINDS[meta["kind"]]
