"""An embedding whose table is a compressed weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .dense import Dense
from .module import CompressedModule
from .value import CompressedWeight


class CompressedEmbedding(CompressedModule):
    """Rows of W [vocabulary, hidden], times `scale`, in `dtype` (the weight's own if None).

    Only the rows that are looked up are computed, where the kind allows it.
    """

    def __init__(
        self,
        weight: CompressedWeight,
        *,
        dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(weight, dtype=dtype)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., hidden]."""
        rows = self.weight_value.rows(ids, self.compute_dtype)
        return rows if self.scale == 1 else rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)


def embedding_of(
    weight: CompressedWeight, like: nn.Embedding, *, dtype: torch.dtype | None = None
) -> CompressedEmbedding | nn.Embedding:
    """The module that looks up a compressed table as `like` looks up its own, in `dtype` (the weight's if None).

    Raises ValueError if `like` is of a class that does more than a look-up and a scale.
    """
    # Gemma's classes have the scale twice, as a number and as a buffer, which may be on the meta device.
    scale = getattr(like, "scalar_embed_scale", getattr(like, "embed_scale", None))
    if type(like).forward is not nn.Embedding.forward and (scale is None or isinstance(weight, Dense)):
        raise ValueError(f"a {type(like).__name__} isn't a plain embedding: its table must stay as it is")
    if not isinstance(weight, Dense):
        factor = 1.0 if scale is None else float(scale)
        return CompressedEmbedding(weight, dtype=dtype, padding_idx=like.padding_idx, scale=factor)
    table = nn.Embedding(*weight.shape, padding_idx=like.padding_idx, device="meta", dtype=weight.dtype)
    table.weight = nn.Parameter(weight.weight, requires_grad=False)
    return table
