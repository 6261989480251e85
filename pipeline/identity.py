"""What a run depends on: hashes of the input, the fingerprint that a resumed run must share, and `modelzip.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from modelzip.checkpoints.index import Checkpoint
from modelzip.kernels import dispatch
from modelzip.recipes.load import recipe_data
from modelzip.recipes.schema import Recipe

from .environment import package_version

PROVENANCE: Final = "modelzip.json"
PACKAGES: Final = ("modelzip", "torch", "transformers", "compressed-tensors", "safetensors")
READ: Final = ("corpus", "data", "validation", "teacher")
"""Settings of stages that name files or folders."""
NOT_IN_THE_BYTES: Final = ("output", "evaluate", "export", "model")


def header_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 over the config and every tensor's name, type, shape and size."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in sorted(checkpoint.tensors):
        info = checkpoint.tensors[name]
        digest.update(f"{name} {info.dtype} {info.shape} {info.nbytes}\n".encode())
    return digest.hexdigest()


def fingerprint_of(recipe: Recipe, checkpoint: Checkpoint) -> str:
    """SHA-256 of all that the output's bytes depend on: recipe, input (its files' sizes and times too), versions,
    the kernels' paths.

    Files beside the weights count too: the tokenizer makes the calibration tokens, and all of them are carried along.
    So do texts, labelled examples and teachers that stages read.
    """
    data = {key: value for key, value in recipe_data(recipe).items() if key not in NOT_IN_THE_BYTES}
    weights = {info.file for info in checkpoint.tensors.values()}
    files = sorted(weights | {checkpoint.folder / path for path in checkpoint.side_files})
    stats = [one for file in files for one in _stats(file)]
    named = [getattr(stage.settings, key, None) for stage in recipe.stages for key in READ]
    stats += [one for path in (recipe.calibration.source, *named) if path is not None for one in _stats(Path(path))]
    versions = {name: package_version(name) for name in PACKAGES}
    paths = [dispatch.path(), dispatch.moment_path(torch.empty(0, dtype=torch.bfloat16))]
    whole = [data, stats, header_hash(checkpoint), versions, *paths]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _stats(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a file, or of all files of a folder; nothing for the name of something on the hub."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def provenance_of(
    recipe: Recipe, checkpoint: Checkpoint, fingerprint: str, stages: Sequence[Mapping[str, Any]]
) -> bytes:
    """modelzip.json: how the output was made. It holds no times and no paths of the output, so it is reproducible.

    stages: what each stage so far recorded.
    """
    data = {key: value for key, value in recipe_data(recipe).items() if key != "output"}
    return _json(
        {
            "format": 1,
            "fingerprint": fingerprint,
            "recipe": data,
            "seed": recipe.seed,
            "source": {"name": checkpoint.source, "headers_sha256": header_hash(checkpoint)},
            "versions": {name: package_version(name) for name in PACKAGES},
            "stages": [dict(one) for one in stages],
        }
    )


def read_provenance(folder: Path, fingerprint: str) -> dict[str, Any] | None:
    """modelzip.json of a finished output of this very run, or None."""
    data = provenance_in(folder)
    return data if data.get("fingerprint") == fingerprint else None


def provenance_in(folder: Path) -> dict[str, Any]:
    """What modelzip.json of a folder says; empty if there is none, or another program's file of that name."""
    file = folder / PROVENANCE
    try:
        data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        data = {}
    return data if isinstance(data, dict) else {}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
