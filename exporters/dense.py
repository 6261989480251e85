"""A compressed checkpoint as a plain one: every matrix as it computes, for runtimes that don't know the layout.

The output takes as many bytes as a dense model does; what was lost in compression stays lost.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modelzip.checkpoints.errors import CheckpointError, OutputError
from modelzip.checkpoints.index import DTYPES, Checkpoint
from modelzip.checkpoints.skeleton import skeleton
from modelzip.checkpoints.target import partial_of
from modelzip.checkpoints.writer import CheckpointWriter
from modelzip.weights.layouts import MODELZIP, decoder
from modelzip.weights.plugin import located

from .places import Place, compressed_places, shared_places

PART_BYTES: Final = 256 << 20
"""Dense bytes in memory at a time, and in a shard, unless a single matrix is larger."""

CAST: Final = ("F64", "F32", "F16", "BF16")
"""Types of tensors that `dtype` changes."""


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. nbytes: once it is dense. replaces: tensors of the checkpoint that it makes needless."""

    name: str
    nbytes: int
    replaces: tuple[str, ...]
    make: Callable[[], Tensor]


def export_dense(
    checkpoint: Checkpoint,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the checkpoint with every compressed matrix dense, and give the folder.

    dtype: of all floating tensors; None leaves them as they are stored, and takes the config's own for the matrices.
    report: told how many bytes of all are written. Called again, a killed run goes on where it stopped. Raises
    CheckpointError if there is nothing to do or the layout isn't known, and what the writer raises.
    """
    entries = list(_entries(checkpoint, dtype))
    if not entries and not checkpoint.source.lower().endswith(".gguf"):
        raise CheckpointError(_nothing(checkpoint, dtype))
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    if dtype is not None:
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": _word(dtype)}
    total, done = sum(entry.nbytes for entry in entries), 0
    with CheckpointWriter.open(
        output,
        source=checkpoint,
        fingerprint=_fingerprint(checkpoint, dtype),
        overwrite=overwrite,
        resume=partial_of(output.expanduser()).exists(),
    ) as writer:
        for number, part in enumerate(_parts(entries)):
            name = f"dense.{number}"
            if name not in writer.done:
                replaces = [tensor for entry in part for tensor in entry.replaces]
                writer.write_part(name, {entry.name: entry.make() for entry in part}, replaces=replaces, record={})
            done += sum(entry.nbytes for entry in part)
            report(done, total)
        return writer.finish(config=config, files={})


def _nothing(checkpoint: Checkpoint, dtype: torch.dtype | None) -> str:
    if dtype is not None:
        return f"{checkpoint.source} is dense already, and its tensors are {_word(dtype)}: there is nothing to do."
    return (
        f"{checkpoint.source} is dense already, so there is nothing to do: name a compressed model, or change its type "
        "with --dtype."
    )


def _entries(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Iterator[Entry]:
    """All tensors of the output that aren't the checkpoint's own."""
    claimed: set[str] = set()
    for entry in _decoded(checkpoint, dtype) if checkpoint.quantization is not None else ():
        left = tuple(name for name in entry.replaces if name not in claimed)
        claimed.update(left)
        yield Entry(entry.name, entry.nbytes, left, entry.make)
    for name, info in checkpoint.tensors.items():
        if dtype is not None and name not in claimed and info.dtype in CAST and DTYPES[info.dtype] != dtype:
            nbytes = math.prod(info.shape) * dtype.itemsize
            yield Entry(name, nbytes, (name,), lambda name=name: _cast(checkpoint, name, dtype))  # type: ignore[misc]


def _decoded(checkpoint: Checkpoint, dtype: torch.dtype | None) -> Iterator[Entry]:
    """Every matrix that is stored compressed, and every tensor that is stored under another's name."""
    config = checkpoint.quantization
    assert config is not None
    try:
        decode = decoder(config)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.source} is {error}, which modelzip doesn't read: it reads its own outputs and "
            "compressed-tensors pack-quantized."
        ) from None
    plain = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    model = skeleton(replace(checkpoint, config=plain))  # the model that will be opened: all sizes are config.json's
    if misfit := _misfit(config, model):
        raise CheckpointError(f"{checkpoint.source}: {misfit}")
    wanted = dtype or _own_dtype(checkpoint)
    for place in compressed_places(checkpoint, model):
        path = located(model, place.module)
        layer = None if path is None else model.get_submodule(path)

        def make(place: Place = place, layer: nn.Module | None = layer) -> Tensor:
            tensors = checkpoint.read(place.parts.values())
            weight = decode(place.module, {suffix: tensors[source] for suffix, source in place.parts.items()})
            dense = weight.dense(wanted).T if isinstance(layer, Conv1D) else weight.dense(wanted)
            return _finite(dense.contiguous(), place.name)

        count = 0 if layer is None else layer.get_parameter("weight").numel()
        yield Entry(place.name, count * wanted.itemsize, tuple(place.parts.values()), make)
    for name, source in shared_places(checkpoint):
        info = checkpoint.tensors[source]
        kept = dtype if dtype is not None and info.dtype in CAST else DTYPES[info.dtype]
        nbytes = math.prod(info.shape) * kept.itemsize
        yield Entry(name, nbytes, (), lambda source=source, kept=kept: _cast(checkpoint, source, kept))  # type: ignore[misc]


def refusal(checkpoint: Checkpoint) -> str | None:
    """Why no plain checkpoint can hold this one, as far as headers and config tell, or None."""
    config = checkpoint.quantization
    if config is None:
        return None
    plain = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return _misfit(config, skeleton(replace(checkpoint, config=plain)))


def _misfit(config: Mapping[str, Any], model: nn.Module) -> str | None:
    """A sentence about the first module of modelzip's own layout that has another size than config.json's."""
    for module, meta in config["modules"].items() if config.get("quant_method") == MODELZIP else ():
        path = located(model, module)
        layer = None if path is None else model.get_submodule(path)
        shape = None if layer is None else list(layer.get_parameter("weight").shape)
        if shape is not None and (shape[::-1] if isinstance(layer, Conv1D) else shape) != list(meta["shape"]):
            return (
                f"{module} is {meta['shape']}, which isn't what config.json asks for, so no plain checkpoint can hold "
                "it: keep it in modelzip's own layout."
            )
    return None


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type that config.json names, or else that of most of the checkpoint."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    found = getattr(torch, str(named), None)
    return found if isinstance(found, torch.dtype) else checkpoint.dtype


def _cast(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Tensor:
    return _finite(checkpoint.read([name], dtype=dtype)[name], name)


def _finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor itself. Raises OutputError if a number is too large for float16."""
    if tensor.dtype == torch.float16 and not bool(tensor.isfinite().all()):
        raise OutputError(f"{name} has numbers beyond the range of float16: choose --dtype bfloat16 or float32.")
    return tensor


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


def _fingerprint(checkpoint: Checkpoint, dtype: torch.dtype | None) -> str:
    """SHA-256 of what the bytes depend on: the files by size and time, the config, the type, the version."""
    files = {info.file for info in checkpoint.tensors.values()}
    stats: list[Any] = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    whole = [checkpoint.config, stats, str(dtype), metadata.version("modelzip")]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
