"""A teacher's logits on disk: it runs once over the data, whatever the epochs, and later runs don't load it at all.

One folder for each teacher, data, temperature and number of logits, in it a file for every so many examples. Each file
is renamed into place when it is whole, so that a killed run goes on with the first that is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from modelzip.checkpoints.gguf import cache_folder
from modelzip.checkpoints.index import Checkpoint
from modelzip.checkpoints.shards import write_file
from modelzip.compressors.distill.cache import TopLogits, top_logits
from modelzip.compressors.distill.settings import Logits

from ..identity import header_hash
from .material import Material

EXAMPLES: Final = 256
"""Examples, or windows, of one file."""
VERSION: Final = 1
TOP_K: Final = 64
PARTS: Final = ("indices", "values", "rest")


def top_k(settings: Logits) -> int:
    """How many logits of a token are kept."""
    return settings.top_k or TOP_K


def cache_root(settings: Logits) -> Path:
    """Where all caches lie."""
    assert settings.cache is not None
    return cache_folder() / "logits" if settings.cache == "auto" else Path(settings.cache).expanduser()


def cache_of(settings: Logits, teacher: Checkpoint, material: Material, *, ids: Tensor | None = None) -> Path:
    """The folder of what this teacher says of these tokens. Another teacher or another setting has another folder.

    The teacher is told by its headers and by its files' sizes and times. ids: its own ids of the material's tokens.
    """
    files = sorted({info.file for info in teacher.tensors.values()})
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    of = [VERSION, header_hash(teacher), stats, settings.temperature, top_k(settings)]
    of += [] if ids is None else [ids.tolist()]
    digest = hashlib.sha256(json.dumps(of).encode())
    for row in material.rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return cache_root(settings) / digest.hexdigest()[:32]


def missing(folder: Path, examples: int) -> list[int]:
    """The first examples of the files that aren't there."""
    return [begin for begin in range(0, examples, EXAMPLES) if not _file(folder, begin).exists()]


@torch.no_grad()
def fill(
    folder: Path, material: Material, teacher: Any, settings: Logits, *, report: Callable[[int, int], None]
) -> None:
    """Let the teacher say what isn't there. report: told how many examples of all are done."""
    folder.mkdir(parents=True, exist_ok=True)
    for begin in missing(folder, len(material)):
        end = min(begin + EXAMPLES, len(material))
        order = sorted(range(begin, end), key=lambda place: material.lengths[place])  # so that little is padded
        kept: list[dict[str, Tensor]] = []
        for first in range(0, len(order), settings.train_batch_size):
            batch = material.batch(order[first : first + settings.train_batch_size])
            batch.pop("labels", None)
            logits = teacher(**{name: tensor.to(teacher.device) for name, tensor in batch.items()}).logits
            items = logits[:, None] if logits.ndim == 2 else logits
            kept.append(top_logits(items, k=top_k(settings), temperature=settings.temperature).tensors())
        back = torch.tensor(order).argsort()
        whole = {name: torch.cat([one[name].cpu() for one in kept])[back].contiguous() for name in PARTS}
        file = _file(folder, begin)
        draft = file.with_suffix(f".{os.getpid()}.partial")
        write_file(draft, save(whole))
        os.replace(draft, file)
        report(end, len(material))


class CachedTeacher:
    """What a teacher said of each example: `batch` gives it to a lesson, `TopLogits` it becomes there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = lru_cache(maxsize=64)(self._opened)

    def _opened(self, begin: int) -> Any:
        return safe_open(_file(self._folder, begin), framework="pt")

    def batch(self, places: Sequence[int]) -> dict[str, Tensor]:
        """[batch, items, k] of each part but rest, which is [batch, items]; by the names that `taken` looks for."""
        found: dict[str, list[Tensor]] = {name: [] for name in PARTS}
        for place in places:
            file = self._open(place - place % EXAMPLES)
            row = place % EXAMPLES
            for name in PARTS:
                found[name].append(file.get_slice(name)[row : row + 1])
        return {f"teacher_{name}": torch.cat(rows) for name, rows in found.items()}


def taken(batch: dict[str, Tensor], temperature: float) -> TopLogits | None:
    """What a teacher said, taken out of a batch; None if it isn't there."""
    if "teacher_indices" not in batch:
        return None
    indices, values, rest = (batch.pop(f"teacher_{name}") for name in PARTS)
    return TopLogits(indices, values, rest, temperature)


def _file(folder: Path, begin: int) -> Path:
    return folder / f"{begin:010d}.safetensors"
