"""Additive quantization: a vector as the sum of one entry of each of several codebooks, found by beam search.

Babenko & Lempitsky 2014, "Additive Quantization for Extreme Vector Compression", section 3.2: which entries have the
nearest sum is a hard problem; the best few partial sums are followed. Egiazarian, Panferov, Kuznedelev, Frantar,
Babenko, Alistarh 2024, "Extreme Compression of Large Language Models via Additive Quantization" (AQLM), section 3: the
same for weights, by the measure of the layer's inputs; codebooks begin as residual k-means (`vector_fit`), then indices
(phase 1) and codebooks (phase 2) take turns.

Where `aqlm` differs from that paper, and why:
- Its beam search goes through all vectors of a row at once. Here it goes through the codebooks of one vector, given the
  others of the row as they stand, one vector after the other (`vector_refine.reassign`): a row has hundreds of vectors.
- Its search starts from the nearest sums. Here it starts from `gptvq`'s pass, whose errors have been spread over the
  columns still to come. On SmolLM2 (2 codebooks of 8 columns, 4 rounds) that ends at 0.085 of the output's size instead
  of 0.094 in a query projection, at 0.173 instead of 0.190 in an up projection.
- Codebooks are fitted by conjugate gradients, since for them the error is quadratic, where the paper takes Adam.
- Codebooks are not tuned further with the whole block's output (phase 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .vector_books import summed
from .vector_kmeans import nearest


def search(points: Tensor, books: Tensor, *, beam: int = 1, start: Tensor | None = None, passes: int = 1) -> Tensor:
    """int64 [n, books]: of each codebook [books, count, dim] the entry by whose sum points [n, dim] are approached.

    With one codebook the nearest entry. With more, the `beam` best sums are followed while one entry after the other is
    chosen anew, the others held, `passes` times through all codebooks. start: indices to begin with, than which the
    result is never worse; without them the first pass builds the sums up. With a beam as wide as a codebook, two
    codebooks are searched exhaustively.
    """
    if len(books) == 1:
        return nearest(points, books[0])[:, None]
    half = books.square().sum(-1) / 2
    codes = points.new_zeros(len(points), 1, len(books), dtype=torch.int64) if start is None else start[:, None]
    left = points[:, None]  # [n, followed, dim]: what is left of a point
    if start is not None:
        left = left - summed(books, start)[:, None]
    for step in range(passes * len(books)):
        number = step % len(books)
        if start is not None or step >= len(books):
            left = left + books[number][codes[..., number]]
        codes, left = _extended(codes, left, books[number], half[number], number=number, beam=beam)
    best = left.square().sum(-1).argmin(1)
    return codes[torch.arange(len(codes), device=codes.device), best]


def _extended(
    codes: Tensor, left: Tensor, entries: Tensor, half: Tensor, *, number: int, beam: int
) -> tuple[Tensor, Tensor]:
    """The best sums with any entry of codebook `number`: codes [n, beam, books] and what is then left of each point."""
    n, followed, _ = left.shape
    gain = torch.addmm(half, left.flatten(0, 1), entries.T, beta=-1).reshape(n, followed, -1)
    if followed > 1:  # minus half the squared distance; without this the same ranks for one sum alone
        gain -= left.square().sum(-1, keepdim=True) / 2
    if beam == 1 and followed == 1:
        chosen = gain.flatten(1).argmax(1, keepdim=True)
    else:
        chosen = gain.flatten(1).topk(min(beam, followed * len(entries)), dim=1).indices
    source, entry = chosen // len(entries), chosen % len(entries)
    row = torch.arange(n, device=left.device)[:, None]
    codes = codes[row, source]
    codes[..., number] = entry
    return codes, left[row, source] - entries[entry]
