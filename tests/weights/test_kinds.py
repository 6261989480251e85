"""What holds for every kind of compressed weight: the disk, the meta device, and one matrix behind all its products."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from modelzip.weights import kinds

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DTYPES, ids=str)
def every(request, weights_of_all_kinds):
    return weights_of_all_kinds(request.param)


def _same(first, second) -> bool:
    one, other = first.tensors(), second.tensors()
    return one.keys() == other.keys() and all(
        (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape)
        and torch.equal(one[name], other[name])
        for name in one
    )


def test_every_kind_is_tried_here(weights_of_all_kinds):
    others = {"int8", "mixed_columns", "rounded_inputs"}  # they round their inputs too, and have tests of their own
    assert {weight.kind for weight in weights_of_all_kinds(torch.float32).values()} == kinds.KINDS.keys() - others


def test_a_weight_survives_the_disk_bit_for_bit(every, tmp_path):
    for name, weight in every.items():
        save_file(weight.tensors(), tmp_path / "weight.safetensors")
        meta = json.loads(json.dumps(weight.meta()))
        found = kinds.from_tensors(load_file(tmp_path / "weight.safetensors"), meta)
        assert type(found) is type(weight), name
        assert _same(found, weight), name
        assert found.meta() == weight.meta() == meta, name
        assert torch.equal(found.dense(), weight.dense()), name


def test_nbytes_is_the_payload_in_the_file(every, tmp_path):
    for name, weight in every.items():
        path = tmp_path / "weight.safetensors"
        save_file(weight.tensors(), path)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        assert weight.nbytes == path.stat().st_size - 8 - header, name


def test_names_of_tensors_begin_with_weight_and_hold_no_dot(every):
    for weight in every.values():
        assert all(name.startswith("weight") and "." not in name for name in weight.tensors())


def test_the_meta_alone_makes_room_of_the_right_shapes_and_dtypes(every):
    for name, weight in every.items():
        room, tensors = kinds.empty(weight.meta()), weight.tensors()
        assert room.shape == weight.shape, name
        assert room.dtype == weight.dtype, name
        assert room.nbytes == weight.nbytes, name
        assert room.meta() == weight.meta(), name
        found = room.tensors()
        assert {key: (t.dtype, t.shape) for key, t in found.items()} == {
            key: (t.dtype, t.shape) for key, t in tensors.items()
        }, name
        assert all(tensor.is_meta for key, tensor in found.items() if not key.endswith("_shape")), name


def test_matmul_is_the_product_with_the_dense_matrix(every):
    generator = torch.Generator().manual_seed(5)
    worst = 0.0
    for weight in every.values():
        x = torch.randn(2, 5, weight.shape[1], generator=generator)
        truth = x.double() @ weight.dense(torch.float64).T
        found = weight.matmul(x)
        assert found.dtype == torch.float32
        worst = max(worst, float((found - truth).norm() / truth.norm()))
    assert worst < 1e-6  # measured: 1.4e-7


def test_matmul_keeps_the_inputs_dtype_and_leading_shape(every):
    for weight in every.values():
        assert weight.matmul(torch.ones(2, 3, weight.shape[1], dtype=torch.bfloat16)).shape == (2, 3, weight.shape[0])
        assert weight.matmul(torch.ones(weight.shape[1], dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_rows_are_rows_of_the_dense_matrix(every):
    index = torch.tensor([[3, 0, 23], [7, 7, 11]])
    for name, weight in every.items():
        for dtype in (torch.float32, torch.bfloat16):
            found, truth = weight.rows(index, dtype), weight.dense(dtype)[index]
            assert (found.dtype, found.shape) == (dtype, truth.shape), name
            error = (found.float() - truth.float()).norm() / truth.float().norm()
            assert float(error) < (1e-6 if dtype == torch.float32 else 4e-3), name  # measured: 8.2e-8, 0


def test_dense_has_the_shape_and_the_dtype_that_are_asked_for(every):
    for weight in every.values():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            dense = weight.dense(dtype)
            assert (tuple(dense.shape), dense.dtype) == (weight.shape, dtype)


def test_a_missing_tensor_is_named(weights_of_all_kinds):
    for weight in weights_of_all_kinds(torch.float32).values():
        tensors = weight.tensors()
        for name in tensors:
            if name.endswith(("_shape", "_zero_point")):  # told by meta; absent where the grid is symmetric
                continue
            # a factor speaks of itself, without its side
            with pytest.raises(KeyError, match=name.replace("_left", "").replace("_right", "")):
                kinds.from_tensors({key: t for key, t in tensors.items() if key != name}, weight.meta())


def test_a_kind_from_the_future_is_refused():
    with pytest.raises(ValueError, match="kind 'wavelet'"):
        kinds.empty({"kind": "wavelet", "shape": [2, 2]})
