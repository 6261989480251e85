"""Storage of waiting batches on disk and back: the same bits, and nothing left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.spill import Spill
from modelzip.checkpoints.streamed import StreamedModel, start


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_a_tensor_comes_back_to_the_bit(tmp_path, dtype):
    spill, held = Spill(0, tmp_path), (10 * tensor(7, 5)).to(dtype)
    before = held.clone()
    spill.register(0, held)
    spill.page_out(0)
    assert held.untyped_storage().nbytes() == 0
    spill.page_in(0)
    assert torch.equal(held, before)


def test_views_of_one_storage_are_one_file_and_all_come_back(tmp_path):
    spill, whole = Spill(0, tmp_path), tensor(6, 8)
    part, turned, before = whole[2:4, ::2], whole.T, whole.clone()
    for held in (whole, part, turned):
        spill.register(0, held)
    spill.page_out(0)
    assert len(files(tmp_path)) == 1
    assert spill.written == whole.nbytes
    spill.page_in(0)
    assert torch.equal(whole, before)
    assert torch.equal(part, before[2:4, ::2])
    assert torch.equal(turned, before.T)


def test_a_view_that_was_never_registered_comes_back_with_its_storage(tmp_path):
    spill, whole = Spill(0, tmp_path), tensor(6, 8)
    view, before = whole[3:], whole.clone()
    spill.register(0, whole)
    spill.page_out(0)
    spill.page_in(0)
    assert torch.equal(view, before[3:])


def test_beyond_a_limit_of_nothing_all_goes_out_and_within_a_large_one_nothing(tmp_path):
    for limit, resident, count in ((0, 0, 1), (159, 0, 1), (160, 160, 0), (1000, 160, 0)):
        spill, held = Spill(limit, tmp_path), tensor(5, 8)
        spill.register(0, held)
        assert spill.resident() == 160
        spill.page_out(0)
        assert spill.resident() == resident
        assert len(files(tmp_path)) == count
        spill.close()


def test_only_the_batches_that_do_not_fit_go_out(tmp_path):
    spill, held = Spill(400, tmp_path), [tensor(5, 8, seed=seed) for seed in range(4)]
    before = [part.clone() for part in held]
    for batch, part in enumerate(held):
        spill.register(batch, part)
        spill.page_out(batch)
    assert [part.untyped_storage().nbytes() for part in held] == [160, 160, 0, 0]
    assert spill.resident() == 320
    for batch in range(4):
        spill.page_in(batch)
    assert all(torch.equal(left, right) for left, right in zip(held, before, strict=True))


def test_going_out_again_writes_what_the_tensor_has_become(tmp_path):
    spill, held = Spill(0, tmp_path), tensor(5, 8)
    spill.register(0, held)
    for _ in range(3):
        spill.page_out(0)
        spill.page_in(0)
        held += 1
    assert torch.equal(held, tensor(5, 8) + 1 + 1 + 1)
    assert spill.written == 3 * 160


def test_a_tensor_that_died_on_disk_is_not_brought_back(tmp_path):
    spill, held = Spill(0, tmp_path), tensor(5, 8)
    spill.register(0, held)
    spill.page_out(0)
    del held
    spill.page_in(0)
    assert spill.resident() == 0
    assert files(tmp_path) == []


def test_a_batch_without_tensors_is_no_trouble(tmp_path):
    spill = Spill(0, tmp_path)
    spill.page_out(3)
    spill.page_in(3)
    spill.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_removes_the_folder_with_what_is_still_out(tmp_path):
    spill, held = Spill(0, tmp_path), tensor(5, 8)
    spill.register(0, held)
    spill.page_out(0)
    assert len(list(tmp_path.iterdir())) == 1
    spill.close()
    assert list(tmp_path.iterdir()) == []


def floating(output) -> list[Tensor]:
    return [value for value in output.values() if isinstance(value, Tensor) and value.is_floating_point()]


def run(folder: Path, models, *, limit: int, into: Path) -> tuple[list[list[Tensor]], list[int], int]:
    """Outputs of two batches; files and resident bytes as they were while batches waited; bytes written in all."""
    streamed = StreamedModel(Checkpoint.open(str(folder)), dtype=torch.float32, device=torch.device("cpu"))
    batches = [{"input_ids": models.tokens(seed=seed, length=length)} for seed, length in ((0, 12), (5, 9))]
    if streamed.model.config.is_encoder_decoder:
        for batch in batches:
            batch["decoder_input_ids"] = models.tokens(length=7, seed=1)
    walk = streamed.walk(batches, spill_limit=limit, spill_folder=into)
    outputs, waiting, resident = [], [], []
    *before, last = streamed.structure.blocks
    start(walk, streamed)
    for block in before:
        waiting.append(len(files(into)))
        resident.append(walk._spill.resident())
        streamed.through(walk, block)
    streamed.load(last)
    walk.stop_at(linear.name for linear in last.linears)
    for batch in range(len(walk)):
        while (stop := walk.advance(batch)).module is not None:
            with walk.input(batch) as held:
                assert torch.isfinite(held).all()
                assert held.untyped_storage().nbytes() > 0
            assert (held.untyped_storage().nbytes() == 0) == (limit == 0)
        outputs.append([value.clone() for value in floating(stop.output)])
    walk.close()
    assert min(waiting) >= (len(batches) if limit == 0 else 0)
    assert limit > 0 or max(resident) == 0
    return outputs, waiting, walk._spill.written


@torch.no_grad()
def test_a_model_walked_with_no_memory_gives_the_same_outputs_and_leaves_no_files(family, saved, models, tmp_path):
    spilled, _, written = run(saved(family), models, limit=0, into=tmp_path)
    assert written > 0
    assert list(tmp_path.iterdir()) == []
    kept, waiting, unwritten = run(saved(family), models, limit=sys.maxsize, into=tmp_path)
    assert (max(waiting), unwritten) == (0, 0)
    for left, right in zip(spilled, kept, strict=True):
        assert left
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
