"""Random compressed weights, and models with some of their linears exchanged by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from modelzip.kernels.bitpack import pack
from modelzip.kernels.vector_linear import Vectors
from modelzip.weights.affine import Affine
from modelzip.weights.bilevel import Bilevel, Coarse
from modelzip.weights.codebook import Codebook
from modelzip.weights.dense import Dense
from modelzip.weights.float import Float
from modelzip.weights.kronecker import Kronecker
from modelzip.weights.layouts import Scheme
from modelzip.weights.linear import CompressedLinear
from modelzip.weights.low_rank import LowRank
from modelzip.weights.small_floats import E2M1, E4M3, E5M2
from modelzip.weights.sparse import Sparse
from modelzip.weights.tensor_train import TensorTrain
from modelzip.weights.value import CompressedWeight
from modelzip.weights.vector_codebook import VectorCodebook
from modelzip.weights.with_outliers import WithOutliers


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


@pytest.fixture(scope="session")
def weights_of_all_kinds(random_weight) -> Callable[..., dict[str, CompressedWeight]]:
    """weights_of_all_kinds(dtype, shape): a random one of every kind and variant; both sizes are multiples of 8."""

    def make(dtype: torch.dtype, shape: tuple[int, int] = (24, 48), seed: int = 0) -> dict[str, CompressedWeight]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> torch.Tensor:
            return (0.2 * torch.randn(size, generator=generator)).to(dtype)

        rows, columns = shape
        kept = torch.rand(rows, columns, generator=generator) < 0.4
        fours = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1).lt(2).reshape(shape)
        eights = torch.rand(rows, columns // 8, 8, generator=generator).argsort(-1).lt(4).reshape(shape)
        plain = Dense(draw(rows, columns)).weight
        group = random_weight(shape, Scheme(4, "group", 8, True), dtype)
        zeros = random_weight(shape, Scheme(3, "group", 8, False), dtype)
        single = random_weight(shape, Scheme(3, "tensor", None, False), dtype)
        left = random_weight((rows, 8), Scheme(4, "channel", None, False), dtype)
        right = random_weight((8, columns), Scheme(8, "group", 8, True), dtype)
        indices = torch.randint(8, shape, generator=generator)
        scales = draw(rows, columns // 8)
        few = torch.rand(rows, columns, generator=generator) < 0.03
        offsets = Codebook.from_indices(
            indices, draw(1, 8).float(), scales, bits=3, dtype=dtype, offset=draw(rows, columns // 8)
        )
        banded = Codebook.from_indices(
            indices, draw(1, 8).float(), draw(rows // 5, columns), bits=3, dtype=dtype, offset=draw(rows // 5, columns)
        )
        by_row = Codebook.from_indices(indices, draw(rows, 8), None, bits=3, dtype=dtype)
        vectors = torch.randint(32, (rows, columns // 4, 1), generator=generator)
        sums = torch.randint(512, (rows, columns // 8, 2), generator=generator)
        bytes_ = torch.randint(-127, 128, (2, 1, 32, 4), generator=generator, dtype=torch.int8)
        floats = torch.randint(126, shape, generator=generator).to(torch.uint8)
        powers = torch.randint(120, 126, (rows, columns // 16), generator=generator).to(torch.uint8)
        coarse = [
            Coarse.of(draw(rows, columns // 8).float().abs() + more, bits=3, block=16, dtype=dtype) for more in (0.1, 3)
        ]
        bilevel = Bilevel(pack(indices.to(torch.uint8), 3), *coarse, 3, shape, dtype)
        return {
            "bilevel": bilevel,
            "outliers beside bilevel": WithOutliers.of(bilevel, 5 * draw(rows, columns), few),
            "outliers beside affine": WithOutliers.of(group, 5 * draw(rows, columns), few),
            "outliers beside zero points": WithOutliers.of(zeros, 5 * draw(rows, columns), few),
            "outliers beside offsets": WithOutliers.of(offsets, 5 * draw(rows, columns), few),
            "outliers beside scales of 5 rows": WithOutliers.of(banded, 5 * draw(rows, columns), few),
            "outliers beside a table a row": WithOutliers.of(by_row, 5 * draw(rows, columns), few),
            "no outliers": WithOutliers.of(single, 5 * draw(rows, columns), few & ~few),
            "vectors": VectorCodebook.from_indices(vectors, Vectors(draw(1, 1, 32, 4), None, None), bits=5),
            "vectors, int8 in sections, scales": VectorCodebook.from_indices(
                vectors, Vectors(bytes_, draw(2, 1) / 64, 5 * draw(rows, 1)), bits=5
            ),
            "vectors, sums, scales by group, rotated": VectorCodebook.from_indices(
                sums, Vectors(draw(1, 2, 512, 8), None, 5 * draw(rows, 3), 5 * draw(8, 8)), bits=9
            ),
            "low rank, vectors": LowRank(
                Dense(draw(rows, 8)),
                VectorCodebook.from_indices(vectors[:8], Vectors(draw(1, 1, 32, 4), None, None), bits=5),
            ),
            "codebook": Codebook.from_indices(indices, draw(1, 8), scales, bits=3, dtype=dtype),
            "codebook, fp32 table": Codebook.from_indices(indices, draw(1, 8).float(), scales, bits=3, dtype=dtype),
            "codebook, offsets": offsets,
            "codebook, a scale for each 5 rows": banded,
            "codebook, a table a row": by_row,
            "float, fp8": Float.from_codes(floats, draw(rows, 1), E4M3, dtype=dtype),
            "float, fp8, one scale": Float.from_codes(floats & 123, draw(1, 1), E5M2, dtype=dtype),
            "float, mxfp4": Float.from_codes(floats & 15, powers, E2M1, dtype=dtype, scale_kind="e8m0"),
            "float, nvfp4": Float.from_codes(
                floats & 15, powers, E2M1, dtype=torch.bfloat16, scale_kind="e4m3", global_scale=torch.tensor([3e5])
            ),
            "affine": group,
            "affine, zero points": zeros,
            "affine, one scale": single,
            "dense": Dense(plain),
            "kronecker": Kronecker(draw(3, rows // 4, columns // 8), draw(3, 4, 8)),
            "kronecker, other order": Kronecker(draw(3, 4, 2), draw(3, rows // 4, columns // 2)),
            "low rank": LowRank(Dense(draw(rows, 7)), Dense(draw(7, columns))),
            "low rank, affine": LowRank(left, right),
            "low rank, sparse": LowRank(Sparse.of_dense(draw(rows, 8), kept[:, :8], dtype=dtype), right),
            "sparse": Sparse.of_dense(plain, kept, dtype=dtype),
            "sparse 2:4": Sparse.of_dense(plain, fours, pattern=(2, 4), dtype=dtype),
            "sparse 4:8": Sparse.of_dense(plain, eights, pattern=(4, 8), dtype=dtype),
            "sparse codes": Sparse.of_affine(zeros, kept),
            "sparse codes, one scale": Sparse.of_affine(single, kept),
            "sparse codes 2:4": Sparse.of_affine(zeros, fours, pattern=(2, 4)),
            "sparse codes 4:8": Sparse.of_affine(group, eights, pattern=(4, 8)),
            "tensor train": TensorTrain((draw(1, 2, 4, 3), draw(3, rows // 4, 2, 5), draw(5, 2, columns // 8, 1))),
        }

    return make
