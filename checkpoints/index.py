"""A checkpoint on disk: its config and the name, shape and place of every tensor, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch
from torch import Tensor

from .errors import CheckpointError
from .headers import TensorInfo, read_header
from .locate import locate

__all__ = ["DTYPES", "Checkpoint", "TensorInfo"]

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"
DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_FOREIGN_WEIGHTS: Final = frozenset(
    {".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".tflite", ".gguf"}
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's folder, seen through its headers. `read` is the only thing that touches weights."""

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    source: str  # what the user named

    @classmethod
    def open(cls, model: str, *, revision: str | None = None) -> Checkpoint:
        """`model` is a folder, a hub id or a .gguf file; CheckpointError says what is wrong with it."""
        folder = locate(model, revision=revision)
        return cls(folder=folder, config=_read_config(folder), tensors=_read_tensors(folder), source=model)

    @property
    def dtype(self) -> torch.dtype:
        """The type that models compute in which holds most of the bytes; fp32 if there is none."""
        sizes: dict[str, int] = {}
        for info in self.tensors.values():
            if info.dtype in ("F32", "BF16", "F16"):
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return DTYPES[max(sizes, key=sizes.__getitem__)] if sizes else torch.float32

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def made_names(self) -> tuple[str, ...]:
        """Tensors that no file holds as they are: `read` makes them."""
        return ()

    @property
    def quantization(self) -> dict[str, Any] | None:
        return self.config.get("quantization_config")

    @cached_property
    def side_files(self) -> tuple[Path, ...]:
        """Paths in the folder, relative to it: everything beside weights, the weights' index and config.json."""
        return tuple(sorted(_side_files(self.folder)))

    def read(
        self, names: Iterable[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """These tensors, floating ones cast to `dtype` (None: as stored). Plain reads, so that no file stays mapped."""
        return read_tensors((self.tensors[name] for name in names), dtype=dtype, device=device)


def read_tensors(
    infos: Iterable[TensorInfo], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """These tensors by name, each file opened once and read in the order of its bytes."""
    wanted: dict[Path, list[TensorInfo]] = {}
    for info in infos:
        wanted.setdefault(info.file, []).append(info)
    tensors = {}
    for file, group in wanted.items():
        try:
            with file.open("rb", buffering=0) as stream:
                for info in sorted(group, key=lambda info: info.offset):
                    tensor = _read_tensor(stream, info)
                    cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                    tensors[info.name] = tensor.to(device=device, dtype=cast)
        except OSError as error:
            raise CheckpointError(f"{file} can't be read: {error.strerror or error}.") from error
    return tensors


def _read_tensor(stream: Any, info: TensorInfo) -> Tensor:
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    view = memoryview(data.numpy())  # type: ignore[arg-type]  # numpy's stubs hide the buffer before 3.12
    stream.seek(info.offset)
    done = 0
    while done < info.nbytes:
        count = stream.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{info.file} ends in the middle of tensor {info.name}; was it changed meanwhile?")
        done += count
    return data.view(DTYPES[info.dtype]).reshape(info.shape)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} isn't valid JSON ({error}); download or save it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} doesn't hold a JSON object; download or save it again.")
    return value


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        below = sorted(entry.name for entry in folder.iterdir() if (entry / CONFIG).is_file())
        hint = f", which {folder / below[0]} has: name that instead" if below else ""
        raise CheckpointError(f"{folder} is not a model: it has no config.json{hint}.")
    config = _read_json(folder / CONFIG)
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"{folder / CONFIG} has a quantization_config that isn't a JSON object.")
    return config


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / INDEX).is_file():
        tensors = _read_indexed(folder)
    elif (folder / SINGLE).is_file():
        tensors = read_header(folder / SINGLE)
    else:
        raise _no_weights(folder)
    if not tensors:
        raise CheckpointError(f"{folder} holds no tensors; download or save the model again.")
    return tensors


def _read_indexed(folder: Path) -> dict[str, TensorInfo]:
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map from tensor names to files; download it again.")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or "\\" in shard or not path.parts:
            raise CheckpointError(f"{folder / INDEX} points to {shard!r}, outside its folder, so it isn't trusted.")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        others = f" and {len(missing) - 1} more of {len(shards)}" if len(missing) > 1 else f", one of {len(shards)}"
        raise CheckpointError(f"{folder} lacks the shard {missing[0]}{others} that its index names; download it again.")
    headers = {shard: read_header(folder / shard) for shard in shards}
    tensors = {}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{folder / shard} lacks the tensor {name} that the index places in it.")
        tensors[name] = headers[shard][name]
    return tensors


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    unsafe = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if unsafe:
        return CheckpointError(
            f"{folder} has its weights in {unsafe[0]}, which can run code when read, and only safetensors is taken: "
            "convert it with `AutoModel.from_pretrained(folder).save_pretrained(new_folder)` if you trust it."
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return CheckpointError(f"{folder} has no {SINGLE}; name the file {folder / gguf[0]} itself.")
    other = [name for name in names if name.endswith(".safetensors")]
    hint = f" (only {other[0]})" if other else ""
    return CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{hint}; download or save the model again.")


def _side_files(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        path = file.relative_to(folder)
        if any(part.startswith(".") for part in path.parts) or not file.is_file():
            continue
        if path.suffix in _FOREIGN_WEIGHTS or path.name.endswith(".index.json") or str(path) == CONFIG:
            continue
        # A module of its own in a subfolder (a sentence encoder's dense layer) is no part of the model's weights.
        if path.suffix == ".safetensors" and (len(path.parts) == 1 or not (file.parent / CONFIG).is_file()):
            continue
        yield path
