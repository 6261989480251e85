"""The header of a safetensors file, read and checked without touching a weight.

A file is eight bytes with the header's length (little endian), that many bytes of JSON, then the tensors' bytes one
after the other. Every defect is found here, so that nothing later can trip over a truncated or forged file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .errors import CheckpointError

HEADER_LIMIT: Final = 100_000_000  # bytes, the limit that safetensors itself sets
ITEM_SIZES: Final = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "C64": 8,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint: what it is and where its bytes lie."""

    name: str
    dtype: str  # as safetensors spells it: "F32", "BF16", ...
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int  # of its first byte, from the start of the file


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file in the order of their bytes; CheckpointError for any defect."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise _broken(file, f"it has {size} bytes and a header needs at least 8")
            length = int.from_bytes(prefix, "little")
            if length > HEADER_LIMIT:
                raise _broken(file, f"its header claims {length} bytes, more than the {HEADER_LIMIT} that are allowed")
            if 8 + length > size:
                raise _broken(file, f"its header claims {length} bytes but the file has {size}")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror or error}.") from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(file, "its header isn't JSON") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header isn't a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    found = sorted((_tensor(file, name, entry, start) for name, entry in header.items()), key=_position)
    _check_contiguous(file, found, start=start, size=size)
    return {info.name: info for info in found}


def _position(info: TensorInfo) -> tuple[int, int, str]:
    return info.offset, info.nbytes, info.name


def _tensor(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _broken(file, f"tensor {name} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise _broken(file, f"tensor {name} has the unknown dtype {dtype!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _broken(file, f"tensor {name} has an invalid shape or data_offsets")
    nbytes = offsets[1] - offsets[0]
    expected = math.prod(shape) * ITEM_SIZES[dtype]
    if nbytes != expected:
        raise _broken(file, f"tensor {name} has {nbytes} bytes where {dtype} {shape} needs {expected}")
    return TensorInfo(name, dtype, tuple(shape), nbytes, file, start + offsets[0])


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_contiguous(file: Path, tensors: list[TensorInfo], *, start: int, size: int) -> None:
    end = start
    for info in tensors:
        if info.offset != end:
            raise _broken(file, f"tensor {info.name} starts at byte {info.offset} where {end} was expected")
        end += info.nbytes
    if end != size:
        raise _broken(file, f"its tensors end at byte {end} but the file has {size}")


def _broken(file: Path, finding: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a valid safetensors file: {finding}; download or save it again.")
