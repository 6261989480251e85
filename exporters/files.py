"""A folder for runtimes that take no safetensors: the format's own files beside the model's config and side files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelzip.checkpoints.index import CONFIG
from modelzip.checkpoints.shards import copy_file, disk_errors, sync_folder, write_file
from modelzip.checkpoints.target import (
    check_apart,
    check_target,
    lock,
    make_parent,
    partial_of,
    publish,
    undo_half_replacement,
)

from .request import Request


def write_files(request: Request, make: Callable[[Path], None], *, config: dict[str, Any]) -> Path:
    """Write the output folder: what `make` puts into the folder that it is given, then config.json and the source's
    side files of other names. Gives the folder.

    All is done in a hidden folder beside the output, which is renamed at the end; what a killed export left there is
    removed. Raises OutputError if the output may not be written, MachineError if the disk is full.
    """
    target = Path(os.path.abspath(request.output.expanduser()))
    partial = partial_of(target)
    check_apart(target, request.checkpoint)
    make_parent(target)
    undo_half_replacement(target)
    check_target(target, overwrite=request.overwrite)
    held = lock(partial, target)
    try:
        with disk_errors(partial):
            for left in partial.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            make(partial)
        for path in request.checkpoint.side_files:
            if not (partial / path).exists():
                copy_file(request.checkpoint.folder / path, partial / path)
        write_file(partial / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        for folder in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
            sync_folder(folder)
        publish(partial, target)
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
        os.close(held)
    return target
