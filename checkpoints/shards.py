"""Writing safetensors files as a stream, so that the bytes depend on the tensors alone and little is in memory.

Within a file, tensors come by falling item size and then by name, so that each one is aligned to its own dtype.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import CheckpointError, MachineError, ModelzipError, OutputError
from .headers import ITEM_SIZES, TensorInfo
from .index import DTYPES

CHUNK: Final = 1 << 24  # bytes
UNWRITTEN: Final = re.compile(r"\d+ requested and \d+ written")
"""What numpy says of a write that the disk cut short; it passes no error number on."""
TORCH_WRITES: Final = ("inline_container", "iostream error", "PytorchStreamWriter")
"""Words of torch.save, which doesn't say why a file can't be written."""
_SPELLINGS: Final = {dtype: spelling for spelling, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Entry:
    """A tensor to be written: what it is, and its bytes, either in memory or in another file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    data: Tensor | TensorInfo

    @classmethod
    def of_tensor(cls, name: str, tensor: Tensor) -> Entry:
        return cls(name, _SPELLINGS[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size(), tensor)

    @classmethod
    def of_file(cls, info: TensorInfo) -> Entry:
        return cls(info.name, info.dtype, info.shape, info.nbytes, info)

    def chunks(self) -> Iterator[memoryview | bytes]:
        if isinstance(self.data, Tensor):
            flat = self.data.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            yield memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy's stubs hide the buffer before 3.12
            return
        yield from raw_bytes(self.data)


def raw_bytes(info: TensorInfo) -> Iterator[bytes]:
    """A tensor's bytes as they lie in its file, a chunk at a time."""
    try:
        with info.file.open("rb") as stream:
            stream.seek(info.offset)
            left = info.nbytes
            while left:
                chunk = stream.read(min(CHUNK, left))
                if not chunk:
                    raise CheckpointError(f"{info.file} ends in the middle of {info.name}; was it changed meanwhile?")
                left -= len(chunk)
                yield chunk
    except OSError as error:
        raise CheckpointError(f"{info.file} can't be read: {error.strerror or error}.") from error


def write_shard(file: Path, entries: Iterable[Entry]) -> tuple[int, str]:
    """One safetensors file, on disk for good when this returns; its size in bytes and its sha256."""
    ordered = sorted(entries, key=lambda entry: (-ITEM_SIZES[entry.dtype], entry.name))
    digest, size = hashlib.sha256(), 0
    head = _header(ordered)
    need = len(head) + sum(entry.nbytes for entry in ordered)
    draft = file.with_name(f".{file.name}.draft")
    with disk_errors(file.parent, need=need), draft.open("wb", buffering=0) as stream:
        for chunk in _stream(head, ordered):
            write_all(stream.fileno(), chunk)
            digest.update(chunk)
            size += len(chunk)
        os.fsync(stream.fileno())
    with disk_errors(file.parent):
        draft.rename(file)
        sync_folder(file.parent)
    return size, digest.hexdigest()


def write_file(file: Path, data: bytes) -> None:
    with disk_errors(file.parent, need=len(data)), file.open("wb", buffering=0) as stream:
        write_all(stream.fileno(), data)
        os.fsync(stream.fileno())


def copy_file(source: Path, target: Path) -> None:
    with disk_errors(target.parent, need=source.stat().st_size):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_all(descriptor: int, data: memoryview | bytes) -> None:
    """os.write may write less than it was given."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(folder: Path, *, need: int = 0) -> Iterator[None]:
    """Turns what the system says about a write in `folder` into a sentence, also where a library passes it on.

    need: bytes that were to be written, 0 if they aren't known.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None and UNWRITTEN.search(str(error)):
            raise _sentence(folder, need, errno.ENOSPC, "") from error
        raise _sentence(folder, need, error.errno, error.strerror or str(error)) from error
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise _sentence(folder, need, int(found[1]), os.strerror(int(found[1]))) from error
    except RuntimeError as error:
        if not any(word in str(error) for word in TORCH_WRITES):
            raise
        raise MachineError(
            f"A file in {folder} wasn't written to its end, which a full disk does ({_free(folder)}): make room "
            "and run it again, where there is --resume with that."
        ) from error


def require_room(folder: Path, need: int) -> None:
    """Raise MachineError if the disk of `folder` has fewer free bytes than that, before they are written."""
    if shutil.disk_usage(folder).free < need:
        raise _sentence(folder, need, errno.ENOSPC, "")


def _sentence(folder: Path, need: int, number: int | None, told: str) -> ModelzipError:
    """What the system's error number and words say about a write in `folder`."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        space = f"{need / 1e6:.1f} MB were to be written and {_free(folder)}" if need else _free(folder)
        return MachineError(
            f"The disk of {folder} is full: {space}; make room and run it again, where there is --resume with that."
        )
    if number == errno.EFBIG:
        return MachineError(
            f"A file in {folder} would be larger than files may be here: raise `ulimit -f`, or take another disk."
        )
    if number == errno.EIO:
        return MachineError(f"The disk of {folder} failed: {told}.")
    return OutputError(f"Can't write in {folder}: {told}.")


def _free(folder: Path) -> str:
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return f"{shutil.disk_usage(there).free / 1e6:.1f} MB are free"


def _stream(head: bytes, entries: Iterable[Entry]) -> Iterator[memoryview | bytes]:
    yield head
    for entry in entries:
        yield from entry.chunks()


def _header(entries: Iterable[Entry]) -> bytes:
    header: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.nbytes],
        }
        start += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
