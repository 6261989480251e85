"""The module that looks up a compressed table."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from modelzip.weights.dense import Dense
from modelzip.weights.embedding import CompressedEmbedding, embedding_of
from modelzip.weights.linear import CompressedLinear
from modelzip.weights.low_rank import LowRank

IDS = torch.tensor([[0, 5, 23], [5, 5, 1]])


def test_it_looks_up_rows_of_the_dense_table(weights_of_all_kinds):
    for name, weight in weights_of_all_kinds(torch.float32).items():
        module = embedding_of(weight, nn.Embedding(24, 48, padding_idx=2))
        truth = weight.dense()[IDS]
        assert module.padding_idx == 2
        assert float((module(IDS) - truth).norm() / truth.norm()) < 1e-6, name  # measured: 1.3e-7
        assert isinstance(module, nn.Embedding) == (weight.kind == "dense")


def test_a_low_rank_table_is_never_made_dense():
    from torch.utils.flop_counter import FlopCounterMode

    table = LowRank(Dense(torch.randn(5000, 4)), Dense(torch.randn(4, 64)))
    with FlopCounterMode(display=False) as counter:
        CompressedEmbedding(table)(IDS)
    assert counter.get_total_flops() == 2 * IDS.numel() * 4 * 64


def test_it_answers_in_the_dtype_of_the_model_it_stands_in(weights_of_all_kinds):
    weight = weights_of_all_kinds(torch.float32)["low rank"]
    module = CompressedEmbedding(weight, dtype=torch.bfloat16)
    assert torch.equal(module(IDS), weight.dense(torch.bfloat16)[IDS])
    assert module.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_the_scale_of_scaled_embeddings_is_kept(weights_of_all_kinds):
    weight = weights_of_all_kinds(torch.float32)["low rank"]
    plain = Gemma3TextScaledWordEmbedding(24, 48, 0, embed_scale=48**0.5)
    plain.weight.copy_(weight.dense())
    found = embedding_of(weight, plain)(IDS)
    assert float((found - plain(IDS)).norm() / found.norm()) < 1e-6  # measured: 5e-8


def test_embeddings_that_do_more_are_refused(weights_of_all_kinds):
    with pytest.raises(ValueError, match="OPTLearnedPositionalEmbedding"):
        embedding_of(weights_of_all_kinds(torch.float32)["low rank"], OPTLearnedPositionalEmbedding(22, 48))


def test_a_head_may_take_its_tensors_from_the_embedding(weights_of_all_kinds):
    weight = weights_of_all_kinds(torch.float32)["low rank, affine"]
    embedding, head = CompressedEmbedding(weight), CompressedLinear(weight)
    for suffix in weight.tensors():
        head.share(suffix, embedding, suffix)
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    assert model.state_dict().keys() == {f"embedding.{suffix}" for suffix in weight.tensors()}
    x = torch.randn(2, 48)
    assert torch.equal(head(x), weight.matmul(x))
    model.half().to(torch.float32)  # makes new buffers
    for suffix in weight.tensors():
        assert getattr(head, suffix) is getattr(embedding, suffix)
