"""A GGUF file becomes a folder like any other, once: plain bf16 safetensors with the tokenizer in a cache.

transformers reads the file and undoes its quantization, in a process of its own (`python -m modelzip.checkpoints.gguf
FILE FOLDER`), so that the caller never holds the whole model.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final

from .errors import CheckpointError
from .fresh import FreshProcessError, fresh
from .shards import disk_errors, file_sha256

MAGIC: Final = b"GGUF"


def converted(file: Path) -> Path:
    """The folder with the model of this file, from the cache if the same bytes were converted before."""
    _check_magic(file)
    size = file.stat().st_size
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", file.name)
    folder = cache_folder() / "gguf" / f"{stem}-{size}-{file_sha256(file)[:16]}"
    if (folder / "config.json").is_file():
        return folder
    with disk_errors(folder.parent, need=4 * size):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{stem[:64]}.", dir=folder.parent))
    try:
        _convert_apart(file, draft)
        with disk_errors(folder.parent):
            draft.chmod(0o755)
            if not folder.exists():  # or else another process was faster, with the same bytes
                draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """$MODELZIP_CACHE, else modelzip in $XDG_CACHE_HOME, else ~/.cache/modelzip."""
    if own := os.environ.get("MODELZIP_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "modelzip"


def convert(file: Path, folder: Path) -> None:
    """Read `file` with transformers and save it to `folder` as a plain bf16 checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parent = str(file.parent)
    read = AutoModelForCausalLM.from_pretrained(parent, gguf_file=file.name, dtype=torch.bfloat16)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weights = read.state_dict()
    with torch.device("meta"):
        plain = type(read)(config)
    del read
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(parent, gguf_file=file.name).save_pretrained(folder)


def _check_magic(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            magic = stream.read(len(MAGIC))
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror or error}.") from error
    if magic != MAGIC:
        raise CheckpointError(f"{file} is not a GGUF file: it doesn't begin with the bytes GGUF; download it again.")


def _convert_apart(file: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="modelzip-") as place:
        try:
            with fresh("modelzip.checkpoints.gguf", str(file.absolute()), str(folder.absolute()), place=Path(place)):
                pass
        except FreshProcessError as error:
            raise CheckpointError(f"{file} can't be converted from GGUF: {str(error).rstrip('.')}.") from None


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    first = str(error).strip().splitlines() or ["no message"]
    print(f"\n{kind.__name__}: {first[0]}", file=sys.stderr, flush=True)
    os._exit(1)  # so that nothing is told behind it


if __name__ == "__main__":
    sys.excepthook = _report  # whatever fails in a foreign library ends in one line for the caller
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
