"""A checkpoint's folder written anew, some of its tensors exchanged for others: safetensors, config and side files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor

from modelzip.checkpoints.target import partial_of
from modelzip.checkpoints.writer import CheckpointWriter

from .request import Request

PART_BYTES: Final = 256 << 20
"""Bytes in memory at a time, and in a shard, unless a single matrix is larger."""


@dataclass(frozen=True, eq=False)
class Entry:
    """Tensors to be written. nbytes: about what they take while they are made. replaces: tensors of the checkpoint that
    they make needless.
    """

    nbytes: int
    replaces: tuple[str, ...]
    make: Callable[[], Mapping[str, Tensor]]


def write_folder(
    request: Request,
    entries: Iterable[Entry],
    *,
    format: str,
    config: dict[str, Any],
    files: Mapping[str, bytes] = MappingProxyType({}),
) -> Path:
    """Write the output folder of the request; tensors that no entry replaces are copied. Gives the folder.

    config, files: of config.json, and of files beside it. Called again, a killed export goes on where it stopped.
    Raises what CheckpointWriter raises.
    """
    parts = list(_parts(entries))
    total, done = sum(entry.nbytes for part in parts for entry in part), 0
    with CheckpointWriter.open(
        request.output,
        source=request.checkpoint,
        fingerprint=_fingerprint(request, format, config),
        overwrite=request.overwrite,
        resume=partial_of(request.output.expanduser()).exists(),
    ) as writer:
        for number, part in enumerate(parts):
            name = f"{format}.{number}"
            if name not in writer.done:
                replaces = [tensor for entry in part for tensor in entry.replaces]
                made = {name: tensor for entry in part for name, tensor in entry.make().items()}
                writer.write_part(name, made, replaces=replaces, record={})
            done += sum(entry.nbytes for entry in part)
            request.report(done, total)
        return writer.finish(config=config, files=files)


def _parts(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Runs of entries of at most PART_BYTES together."""
    part: list[Entry] = []
    size = 0
    for entry in entries:
        if part and size + entry.nbytes > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(entry)
        size += entry.nbytes
    if part:
        yield part


def _fingerprint(request: Request, format: str, config: dict[str, Any]) -> str:
    """SHA-256 of what the bytes depend on: the files by size and time, both configs, what was asked, the version."""
    checkpoint = request.checkpoint
    files = {info.file for info in checkpoint.tensors.values()}
    stats: list[Any] = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    asked = [format, request.scheme, str(request.dtype), metadata.version("modelzip")]
    whole = [checkpoint.config, config, stats, asked]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
