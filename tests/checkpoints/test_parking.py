"""Tensors moved into slots: the same values under every name that they have, and slots that are used again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modelzip.checkpoints.parking import LEAST_BYTES, Parking, _counts_are_known

COLUMNS = LEAST_BYTES // 4 // 8


@pytest.fixture
def parking() -> Parking:
    return Parking()


def tensor(rows: int = 8, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))


def room(parking: Parking) -> int:
    """Bytes of all slots."""
    return sum(size * len(slots) for size, slots in parking._slots.items())


def test_this_torch_counts_the_users_of_a_storage():
    assert _counts_are_known()


def test_a_tensor_that_is_still_held_moves_and_keeps_its_values(parking):
    held, gone = tensor(), tensor(seed=1)
    before, place = held.clone(), held.data_ptr()
    parking.see(0, (held, gone, None, "text"))
    del gone
    parking.park(0)
    assert held.data_ptr() != place
    assert torch.equal(held, before)
    assert room(parking) == held.nbytes


def test_the_views_that_were_seen_move_together(parking):
    whole = tensor(16)
    part, turned, before = whole[2:9, ::3], whole.T, whole.clone()
    parking.see(0, (part, turned, whole))
    parking.park(0)
    assert room(parking) == whole.nbytes
    whole[3] += 1
    before[3] += 1
    assert torch.equal(part, before[2:9, ::3])
    assert torch.equal(turned, before.T)


def test_a_view_brings_its_base_along(parking):
    view = tensor(16).view(32, -1)
    before, place = view.clone(), view.data_ptr()
    parking.see(0, (view,))
    parking.park(0)
    assert view.data_ptr() != place
    assert torch.equal(view, before)


def test_what_has_a_view_that_was_not_seen_stays(parking):
    whole = tensor()
    unseen, place = whole.detach(), whole.data_ptr()
    parking.see(0, (whole,))
    parking.park(0)
    assert whole.data_ptr() == place == unseen.data_ptr()
    assert room(parking) == 0


def test_small_tensors_parameters_and_other_devices_stay(parking):
    small, parameter = torch.ones(8), nn.Parameter(tensor())
    meta = torch.empty(8, COLUMNS, device="meta")
    places = small.data_ptr(), parameter.data_ptr()
    parking.see(0, (small, parameter, meta))
    parking.park(0)
    assert (small.data_ptr(), parameter.data_ptr()) == places
    assert room(parking) == 0


def test_a_slot_serves_again_and_never_two_at_once(parking):
    first = tensor(seed=1)
    parking.see(0, (first,))
    parking.park(0)
    slot, kept = first.data_ptr(), first[1:3]
    del first
    second, wanted = tensor(seed=2), kept.clone()
    parking.see(1, (second,))
    parking.park(1)
    assert second.data_ptr() != slot  # a view of the first is still there
    assert torch.equal(kept, wanted)
    del kept
    third = tensor(seed=3)
    parking.see(0, (third,))
    parking.park(0)
    assert third.data_ptr() == slot
    assert torch.equal(second, tensor(seed=2))
    assert torch.equal(third, tensor(seed=3))


def test_slots_of_a_size_that_is_not_wanted_now_are_given_up(parking):
    large = tensor(64)
    parking.see(0, (large,))
    parking.park(0)
    del large
    small = tensor()
    parking.see(0, (small,))
    parking.park(0)
    assert room(parking) == small.nbytes


def test_what_stays_parked_is_not_moved_again(parking):
    held = tensor()
    parking.see(0, (held,))
    parking.park(0)
    place = held.data_ptr()
    parking.park(0)
    assert held.data_ptr() == place
    assert room(parking) == held.nbytes


def test_where_torch_counts_otherwise_nothing_is_moved(monkeypatch):
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    parking, held = Parking(), tensor()
    place = held.data_ptr()
    parking.see(0, (held,))
    parking.park(0)
    assert held.data_ptr() == place
