"""The compressed weight: what goes to disk comes back bit for bit and means what compressed-tensors says it means."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from modelzip.weights.affine import Affine
from modelzip.weights.layouts import Scheme

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRIDS = [("tensor", None), ("channel", None), ("group", 8), ("group", 16)]


def _schemes(bits):
    return [Scheme(bits, strategy, size, symmetric) for strategy, size in GRIDS for symmetric in (True, False)]


def _same(found: Affine, wanted: Affine) -> bool:
    zeros = (found.zero_point, wanted.zero_point)
    return (
        torch.equal(found.packed, wanted.packed)
        and torch.equal(found.scale, wanted.scale)
        and found.scale.dtype == wanted.scale.dtype
        and (zeros == (None, None) or (zeros[0].dtype == torch.int8 and torch.equal(*zeros)))
        and (found.bits, found.shape, found.strategy) == (wanted.bits, wanted.shape, wanted.strategy)
    )


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_weight_survives_the_disk_bit_for_bit(bits, scale_dtype, random_weight, tmp_path):
    for scheme in _schemes(bits):
        for shape in ((7, 48), (1, 32), (33, 16), (2, 8)):
            if shape[1] % (scheme.group_size or 1):
                continue
            weight = random_weight(shape, scheme, scale_dtype)
            save_file(weight.tensors(), tmp_path / "weight.safetensors")
            assert _same(Affine.from_tensors(load_file(tmp_path / "weight.safetensors"), weight.meta()), weight)


@pytest.mark.parametrize("shape", [(5, 33), (1, 1), (3, 70), (1, 7), (9, 1)])
def test_odd_shapes_survive_too(shape, random_weight):
    for bits in (2, 3, 5, 8):
        for strategy in ("tensor", "channel"):
            weight = random_weight(shape, Scheme(bits, strategy, None, False))
            assert _same(Affine.from_tensors(weight.tensors(), weight.meta()), weight)


def test_the_strategy_is_read_off_the_scales(random_weight):
    for scheme in _schemes(4):
        assert Scheme.of(random_weight((6, 32), scheme)) == scheme
    assert Scheme.of(random_weight((6, 32), Scheme(4, "group", 32, True))) == Scheme(4, "channel", None, True)
    assert random_weight((6, 32), Scheme(4, "group", 8, True)).group_size == 8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_nbytes_is_the_payload_in_the_file(bits, random_weight, tmp_path):
    for scheme in _schemes(bits):
        weight = random_weight((7, 48), scheme, torch.bfloat16)
        path = tmp_path / "weight.safetensors"
        save_file(weight.tensors(), path)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        assert weight.nbytes == path.stat().st_size - 8 - header


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compressed_tensors_makes_the_same_matrix_of_it_to_the_bit(bits, scale_dtype, random_weight):
    for scheme in _schemes(bits):
        weight = random_weight((7, 48), scheme, scale_dtype)
        arguments = QuantizationArgs(
            num_bits=bits, symmetric=scheme.symmetric, strategy=scheme.strategy, group_size=scheme.group_size
        )
        theirs = PackedQuantizationCompressor.decompress(
            weight.tensors(), QuantizationScheme(targets=["Linear"], weights=arguments)
        )["weight"]
        assert theirs.dtype == scale_dtype
        assert torch.equal(weight.dense(scale_dtype), theirs)
        assert torch.equal(weight.dense(), theirs.float())


@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compressed_tensors_makes_the_same_file_of_that_matrix(bits, scale_dtype, random_weight):
    for scheme in _schemes(bits):
        weight = random_weight((7, 48), scheme, scale_dtype)
        arguments = QuantizationArgs(
            num_bits=bits, symmetric=scheme.symmetric, strategy=scheme.strategy, group_size=scheme.group_size
        )
        one = scheme.strategy == "tensor"
        exact = dataclasses.replace(weight, scale=weight.scale.double()).dense(torch.float64)
        state = {"weight": exact, "weight_scale": weight.scale.reshape(1) if one else weight.scale}
        if weight.zero_point is not None:
            state["weight_zero_point"] = weight.zero_point.reshape(1) if one else weight.zero_point
        theirs = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=arguments))
        ours = weight.tensors()
        assert theirs.keys() == ours.keys()
        for name, tensor in ours.items():
            assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
            assert torch.equal(tensor, theirs[name])


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_and_zero_point_of_the_signed_range_is_held(bits):
    half = 1 << (bits - 1)
    codes = torch.arange(-half, half).expand(2 * half, -1)
    zero_point = torch.arange(-half, half, dtype=torch.int8)[:, None]
    weight = Affine.from_codes(codes, torch.full((2 * half, 1), 0.5), zero_point, bits=bits)
    assert torch.equal(weight.codes(), codes.to(torch.int8))
    again = Affine.from_tensors(weight.tensors(), weight.meta())
    assert again.zero_point is not None
    assert torch.equal(again.zero_point, zero_point)
    assert torch.equal(again.dense(), (codes - zero_point) * 0.5)


def test_the_product_of_code_and_scale_is_rounded_to_the_scales_dtype():
    codes, scale = torch.tensor([[3, -8]]), torch.tensor([[0.1]], dtype=torch.bfloat16)
    weight = Affine.from_codes(codes, scale, None, bits=4)
    assert torch.equal(weight.dense(torch.float32), (codes * scale).float())
    assert not torch.equal(weight.dense(torch.float32), codes * scale.float())


@pytest.mark.parametrize("bits", [3, 4])
def test_matmul_is_the_product_with_the_dense_matrix(bits, random_weight):
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    for scheme in _schemes(bits):
        weight = random_weight((7, 48), scheme, torch.bfloat16)
        truth = x.double() @ weight.dense(torch.float64).T
        assert float((weight.matmul(x) - truth).norm() / truth.norm()) < 3e-7  # measured: 1.1e-7


def test_a_missing_tensor_is_named(random_weight):
    tensors = random_weight((7, 48), Scheme(4, "channel", None, True)).tensors()
    for name in ("weight_packed", "weight_scale", "weight_shape"):
        with pytest.raises(KeyError, match=name):
            Affine.from_tensors({key: value for key, value in tensors.items() if key != name}, {"bits": 4})
