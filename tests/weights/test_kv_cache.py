"""Rounding of keys and values as they are cached."""

from __future__ import annotations

import copy

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from torch import nn

from modelzip.weights.kv_cache import CacheScheme, CacheView, change_cached, round_cached

SCHEMES = [CacheScheme(codes, strategy) for codes in ("fp8", "int8", "int4") for strategy in ("tensor", "attn_head")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.codes}-{scheme.strategy}")
def test_it_rounds_as_compressed_tensors_does_bit_for_bit(scheme, dtype):
    x = torch.randn(3, 2, 50, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = torch.full(scheme.shape(1 if scheme.strategy == "tensor" else 2), 2.0 / scheme.highest).to(dtype)
    scale[-1:] *= 1.3
    wanted = fake_quantize(x, scale, None, QuantizationArgs(**scheme.words))
    found = scheme.rounded(x, scale)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, x)
    assert len(found[0, 0].unique()) <= 2**scheme.bits


@pytest.mark.parametrize("scheme", SCHEMES)
def test_words_say_what_they_are_read_from(scheme):
    assert CacheScheme.of({"kv_cache_scheme": scheme.words}) == scheme
    assert CacheScheme.of({"kv_cache_scheme": None}) is CacheScheme.of({}) is None


@pytest.mark.parametrize(
    "changed", [{"dynamic": True}, {"symmetric": False}, {"num_bits": 6}, {"strategy": "group"}, {"type": "float"}]
)
def test_words_for_anything_else_are_refused(changed):
    words = {**CacheScheme("int4", "attn_head").words, **changed}
    with pytest.raises(ValueError, match="quantized with a cache of"):
        CacheScheme.of({"kv_cache_scheme": words})


def test_its_gradient_is_that_of_the_identity():
    scheme = CacheScheme("int4", "tensor")
    x = torch.randn(1, 2, 5, 8, requires_grad=True)
    made = scheme.rounded(x, torch.tensor([0.3]))
    made.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    torch.testing.assert_close(made.detach(), scheme.rounded(x.detach(), torch.tensor([0.3])))


class Attention(nn.Module):
    """Puts x and 2x into its cache, and gives back what it holds."""

    def forward(self, x, past_key_values=None):
        return (x, 2 * x) if past_key_values is None else past_key_values.update(x, 2 * x)


class Cache:
    length = 7

    def update(self, keys, values):
        return keys + 100, values + 100


@pytest.mark.parametrize("named", [False, True])
def test_what_goes_into_a_cache_or_none_is_changed(named):
    module, x = Attention(), torch.ones(1)
    handle = change_cached(module, lambda keys, values: (-keys, -values))

    def called(cache):
        return module(x, past_key_values=cache) if named else module(x, cache)

    assert called(None) == (-1, -2)
    assert called(Cache()) == (99, 98)
    handle.remove()
    assert called(Cache()) == (101, 102)


def test_with_only_real_caches_calls_without_one_are_left_alone_and_views_are_taken_away():
    module, x = Attention(), torch.ones(1)
    change_cached(module, lambda keys, values: (-keys, -values), only_real=True)
    assert module(x) == (1, 2)
    assert module(x, CacheView(Cache(), lambda keys, values: (3 * keys, 3 * values))) == (99, 98)


def test_a_view_has_everything_else_of_its_cache():
    view = CacheView(Cache(), lambda keys, values: (keys, values))
    assert view.length == 7
    with pytest.raises(AttributeError, match="no cache that could have a length"):
        _ = CacheView(None, lambda keys, values: (keys, values)).length


def test_a_module_without_a_cache_can_not_round_one():
    with pytest.raises(ValueError, match="a Linear has no cache"):
        round_cached(nn.Linear(2, 2), CacheScheme("fp8", "tensor"), 1)


def test_a_copied_or_pickled_module_rounds_by_scales_of_its_own(tmp_path):
    module = Attention()
    round_cached(module, CacheScheme("int8", "tensor"), 1)
    other = copy.deepcopy(module)
    other.k_scale.fill_(0.5)
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other(x)[0], (x / 0.5).round().clamp(-128, 127) * 0.5)
    assert torch.equal(module(x)[0], x.round())
    torch.save(other, tmp_path / "module.pt")
    again = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(again(x)[0], other(x)[0])


def test_without_a_cache_nothing_is_in_it():
    assert CacheView(None, lambda keys, values: (keys, values)).get_seq_length() == 0
