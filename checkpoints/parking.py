"""Room for what waiting batches hold, apart from where their forwards work.

Left where a forward put it, a tensor that outlives its step lies between the freed temporaries of that step, and no
later tensor fits into the gaps: the process grows to twice what it holds, or gives memory back to the system all the
time and has it cleared anew, which costs more than the copies made here.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from .memory import apart

LEAST_BYTES = 1 << 18
"""Smaller tensors stay where they are."""


class Parking:
    """Moves the CPU tensors that a batch still holds when it stops into slots that are used again, size by size."""

    def __init__(self) -> None:
        self._seen: dict[int, list[weakref.ref[Tensor]]] = {}
        self._slots: dict[int, list[UntypedStorage]] = {}
        self._works = _counts_are_known()

    def see(self, batch: int, values: Iterable[Any]) -> None:
        """What is handed to a module may be held until the batch stops."""
        if self._works:
            tensors = (t for t in values if isinstance(t, Tensor) and not isinstance(t, nn.Parameter))
            self._seen.setdefault(batch, []).extend(weakref.ref(t) for t in tensors if t.device.type == "cpu")

    def park(self, batch: int) -> None:
        """Move what the batch was seen with and still holds. Slots of sizes that it doesn't hold now are given up."""
        held = [tensor for ref in self._seen.pop(batch, []) if (tensor := ref()) is not None]
        bases = [tensor._base for tensor in held if tensor._base is not None]
        owners: dict[int, dict[int, Tensor]] = {}
        for tensor in (*held, *bases):
            owners.setdefault(tensor.untyped_storage()._cdata, {})[id(tensor)] = tensor
        parked = {slot._cdata for slots in self._slots.values() for slot in slots}
        sizes = set()
        for place, tensors in owners.items():
            storage = next(iter(tensors.values())).untyped_storage()
            if storage.nbytes() < LEAST_BYTES or place in parked:
                continue
            if _uses(storage) == 1 + len(tensors):  # else a view that wasn't seen would be left behind
                self._move(storage, tensors.values())
                sizes.add(storage.nbytes())
        for size in self._slots.keys() - sizes:
            self._slots[size] = [slot for slot in self._slots[size] if _uses(slot) > 1]
        self._seen[batch] = [weakref.ref(tensor) for tensor in held]

    def forget(self, batch: int) -> None:
        """What the batch was seen with needn't be parked."""
        self._seen.pop(batch, None)

    def _move(self, storage: UntypedStorage, tensors: Iterable[Tensor]) -> None:
        size = storage.nbytes()
        slots = self._slots.setdefault(size, [])
        slot = next((slot for slot in slots if _uses(slot) == 1), None)
        if slot is None:
            slots.append(slot := apart(size))
        slot.copy_(storage)
        for tensor in tensors:
            tensor.set_(slot, tensor.storage_offset(), tensor.shape, tensor.stride())


def _uses(storage: UntypedStorage) -> int:
    """How many tensors have this storage, and one for the Python object `storage`."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def _counts_are_known() -> bool:
    """Whether this version of torch counts a storage's users as expected; nothing is moved where it doesn't."""
    if not hasattr(torch._C, "_storage_Use_Count"):
        return False
    storage = torch.empty(8, dtype=torch.uint8).untyped_storage()
    alone = _uses(storage)
    tensor = torch.empty(0, dtype=torch.uint8).set_(storage)
    one = _uses(storage)
    views = tensor.view(2, 4), tensor[1:]
    return (alone, one, _uses(storage), len(views)) == (1, 2, 4, 2)
