"""The factorized embedding held against the identity of the weighted SVD, and against plain SVD."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modelzip.compressors.factorize.embedding import embedding_factors, smoothed
from modelzip.compressors.factorize.settings import Embedding, Svd
from modelzip.compressors.factorize.svd import svd


def table(tokens: int = 200, hidden: int = 16) -> tuple[Tensor, Tensor]:
    """An embedding and counts as in a language: few tokens come often, and these lie in directions of their own."""
    generator = torch.Generator().manual_seed(0)
    counts = (5000 / torch.arange(1, tokens + 1)).floor()
    embedding = torch.randn(tokens, hidden, generator=generator) * torch.linspace(0.3, 2, hidden)
    embedding[:20] = torch.randn(20, hidden, generator=generator) * torch.linspace(2, 0.3, hidden)
    return embedding, counts


def loss(embedding: Tensor, factors: tuple[Tensor, Tensor], frequency: Tensor) -> float:
    lost = embedding.double() - factors[0].double() @ factors[1].double()
    return float((frequency.double() * lost.square().sum(1)).sum())


@pytest.mark.parametrize("rank", [1, 6, 15])
def test_the_weighted_error_is_the_sum_of_the_squared_singular_values_left_out(rank):
    embedding, counts = table()
    factors = embedding_factors(embedding, Embedding(rank=rank), counts)
    assert (factors[0].shape, factors[1].shape) == ((200, rank), (rank, 16))
    dropped = torch.linalg.svdvals(counts.sqrt().double()[:, None] * embedding.double())[rank:].square().sum()
    assert loss(embedding, factors, counts) == pytest.approx(float(dropped), rel=1e-5)  # measured: 3e-9


def test_with_frequencies_it_loses_less_of_the_text_than_plain_svd():
    embedding, counts = table()
    ours = loss(embedding, embedding_factors(embedding, Embedding(rank=6), counts), counts)
    assert ours < 0.75 * loss(embedding, svd(embedding, Svd(rank=6)), counts)  # measured: 0.63


def test_without_frequencies_it_is_plain_svd():
    embedding, _ = table()
    left, right = embedding_factors(embedding, Embedding(rank=6))
    a, b = svd(embedding, Svd(rank=6))
    assert float((left @ right - a @ b).norm() / (a @ b).norm()) < 1e-6  # measured: 9e-8


def test_tokens_without_weight_keep_what_the_others_directions_hold_of_them():
    embedding, counts = table()
    counts[50:] = 0
    left, right = embedding_factors(embedding, Embedding(rank=6), counts)
    assert torch.isfinite(left).all()
    assert torch.allclose(left, embedding @ right.T, atol=1e-5)


def test_energy_and_ratio_say_the_rank():
    embedding, counts = table()
    shares = torch.linalg.svdvals(counts.sqrt().double()[:, None] * embedding.double()).square().cumsum(0)
    rank = embedding_factors(embedding, Embedding(energy=0.9), counts)[0].shape[1]
    assert shares[rank - 1] >= 0.9 * shares[-1] > shares[rank - 2]
    left, right = embedding_factors(embedding, Embedding(ratio=0.5), counts)
    assert left.numel() + right.numel() <= 0.5 * embedding.numel()


def test_smoothed_counts_have_mean_one_and_no_zero():
    weights = smoothed(torch.tensor([0, 3, 8]))
    assert torch.allclose(weights, torch.tensor([0.2143, 0.8571, 1.9286], dtype=torch.float64), atol=1e-4)
