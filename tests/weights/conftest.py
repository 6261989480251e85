"""Random compressed weights, and models with some of their linears exchanged by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from modelzip.weights.affine import Affine
from modelzip.weights.layouts import Scheme
from modelzip.weights.linear import CompressedLinear


@pytest.fixture(scope="session")
def random_weight() -> Callable[..., Affine]:
    """random_weight(shape, scheme, scale_dtype) -> a weight with random codes, scales of both signs, zero points."""

    def make(
        shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype = torch.float32, *, seed: int = 0
    ) -> Affine:
        generator = torch.Generator().manual_seed(seed)
        rows, columns = shape
        half = 1 << (scheme.bits - 1)
        scales = {"tensor": (1, 1), "channel": (rows, 1), "group": (rows, columns // (scheme.group_size or columns))}
        size = scales[scheme.strategy]
        codes = torch.randint(-half, half, shape, generator=generator)
        sign = torch.randn(size, generator=generator).sign()
        scale = sign * (1 + torch.rand(size, generator=generator)) * 0.3 / half
        zero_point = torch.randint(-half, half, size, generator=generator).to(torch.int8)
        return Affine.from_codes(
            codes, scale.to(scale_dtype), None if scheme.symmetric else zero_point, bits=scheme.bits
        )

    return make


@pytest.fixture(scope="session")
def exchange(random_weight) -> Callable[[nn.Module, Mapping[str, Scheme], torch.dtype], dict[str, Affine]]:
    """exchange(model, schemes, scale_dtype): these linears (or Conv1D) become random compressed ones; gives them."""

    def change(model: nn.Module, schemes: Mapping[str, Scheme], scale_dtype: torch.dtype) -> dict[str, Affine]:
        weights = {}
        for seed, (name, scheme) in enumerate(schemes.items()):
            module = model.get_submodule(name)
            rows, columns = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape
            weights[name] = random_weight((rows, columns), scheme, scale_dtype, seed=seed)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, CompressedLinear(weights[name], module.bias))
        return weights

    return change


@pytest.fixture(scope="session")
def make_dense() -> Callable[[nn.Module, Mapping[str, Affine]], nn.Module]:
    """make_dense(model, weights): the plain model with these weights in place of its own, dequantized."""

    def change(model: nn.Module, weights: Mapping[str, Affine]) -> nn.Module:
        with torch.no_grad():
            for name, weight in weights.items():
                module = model.get_submodule(name)
                dense = weight.dense(module.weight.dtype)
                module.weight.copy_(dense.T if isinstance(module, Conv1D) else dense)
        return model

    return change
