"""The grid that a linear gets: a group size that fits its columns, its scheme as files say it, and what it weighs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

import torch

from modelzip.checkpoints.blocks import Linear
from modelzip.checkpoints.index import DTYPES, Checkpoint
from modelzip.compressors.quantize.settings import QuantizeSettings
from modelzip.kernels.bitpack import packed_words
from modelzip.weights.affine import Affine
from modelzip.weights.layouts import Scheme
from modelzip.weights.value import dtype_name

SMALLEST_GROUP: Final = 16
"""Group sizes that replace one that doesn't divide are powers of two from here up: the ones that engines take."""


def fit_group(settings: QuantizeSettings, columns: int) -> tuple[QuantizeSettings, str]:
    """The settings with a group size that divides the columns, and what was changed."""
    size = settings.group_size
    if not isinstance(size, int) or columns % size == 0:
        return settings, ""
    fitting = [
        1 << power for power in range(4, 16) if SMALLEST_GROUP <= 1 << power < size and columns % (1 << power) == 0
    ]
    chosen: int | str = max(fitting) if fitting else "channel"
    return settings.model_copy(update={"group_size": chosen}), f"group {size} doesn't divide {columns} columns"


def scheme_of(settings: QuantizeSettings, shape: tuple[int, int]) -> Scheme:
    """The scheme of a matrix of this shape (out, in)."""
    size = settings.group_size
    if isinstance(size, int) and size < shape[1]:
        return Scheme(settings.bits, "group", size, settings.symmetric)
    strategy = "tensor" if size == "tensor" and shape[0] > 1 else "channel"
    return Scheme(settings.bits, strategy, None, settings.symmetric)


def meta_of(settings: QuantizeSettings, linear: Linear, checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json says of the weight that a linear will have."""
    stored = checkpoint.tensors[linear.tensor].dtype
    dtype = torch.float32 if stored == "F64" else DTYPES[stored]
    scheme = asdict(scheme_of(settings, linear.shape))
    return {"kind": Affine.kind, "shape": list(linear.shape), **scheme, "dtype": dtype_name(dtype)}


def packed_bytes(linear: Linear, settings: QuantizeSettings, checkpoint: Checkpoint) -> int:
    """Bytes of the packed weight, scales, zero points and shape."""
    rows, columns = linear.shape
    info = checkpoint.tensors[linear.tensor]
    scale_bytes = min(4, info.nbytes // (rows * columns))
    size = settings.group_size
    groups = columns // size if isinstance(size, int) else 1
    scales = 1 if size == "tensor" else rows * groups
    zeros = 0
    if not settings.symmetric:
        zeros = 1 if size == "tensor" else 4 * packed_words(rows, settings.bits) * groups
    return 4 * rows * packed_words(columns, settings.bits) + scales * scale_bytes + zeros + 16
