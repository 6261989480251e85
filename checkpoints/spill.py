"""What waiting batches hold, on disk beyond a limit.

A waiting batch's tensors can't be taken away from the frames that hold them, but their storage can: it is written to a
file and shrunk to nothing, and comes back before the batch goes on.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass
class _Held:
    """The tensors one batch is known to hold, and where those on disk lie."""

    tensors: list[weakref.ref[Tensor]] = field(default_factory=list)
    files: dict[Path, tuple[weakref.ref[Tensor], int]] = field(default_factory=dict)

    def alive(self) -> list[Tensor]:
        """One tensor for each distinct storage that is still held."""
        self.tensors = [ref for ref in self.tensors if ref() is not None]
        storages = {t.untyped_storage()._cdata: t for ref in self.tensors if (t := ref()) is not None}
        return list(storages.values())


class Spill:
    """Keeps at most `limit` bytes of the registered tensors in memory; the rest goes to files in `folder`."""

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self.limit = limit
        self.written = 0
        self._parent = folder
        self._folder: Path | None = None
        self._held: dict[int, _Held] = {}

    def resident(self) -> int:
        """Bytes of registered tensors that are in memory now."""
        return sum(t.untyped_storage().nbytes() for held in self._held.values() for t in held.alive())

    def register(self, batch: int, tensor: Tensor) -> None:
        """A tensor that a batch will hold while it waits."""
        self._held.setdefault(batch, _Held()).tensors.append(weakref.ref(tensor))

    def page_out(self, batch: int) -> bool:
        """Spill what a batch holds if memory holds too much, and say whether that is so.

        Storage that can't be resized (parked while there was room) stays.
        """
        held = self._held.get(batch)
        if held is None or self.resident() <= self.limit:
            return False
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="modelzip-", dir=self._parent))
        for number, alive in enumerate(held.alive()):
            storage = alive.untyped_storage()
            if not storage.resizable():
                continue
            size = storage.nbytes()
            path = self._folder / f"{batch}-{number}"
            _bytes(alive).to("cpu", copy=True).numpy().tofile(path)  # numpy() of the storage itself would pin its size
            storage.resize_(0)
            held.files[path] = (weakref.ref(alive), size)
            self.written += size
        return True

    def page_in(self, batch: int) -> None:
        """Bring back everything that a batch holds."""
        held = self._held.get(batch)
        if held is None:
            return
        for path, (ref, size) in held.files.items():
            tensor = ref()
            if tensor is not None:
                tensor.untyped_storage().resize_(size)
                _bytes(tensor).copy_(torch.from_numpy(np.fromfile(path, dtype=np.uint8)))
            path.unlink()
        held.files.clear()

    def close(self) -> None:
        """Remove all files."""
        self._held.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _bytes(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
