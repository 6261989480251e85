"""Memory and disk: what a run needs, and whether the machine has it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from modelzip.checkpoints.blocks import Structure
from modelzip.checkpoints.errors import MachineError
from modelzip.checkpoints.index import Checkpoint
from modelzip.recipes.schema import Recipe

from .measure import pick_dtype

BASE_BYTES: Final = 420 << 20
"""Python, torch and transformers in memory."""


def memory_needed(
    recipe: Recipe, checkpoint: Checkpoint, structure: Structure, config: Any, *, needs_data: bool
) -> int:
    """Bytes the run will need: the interpreter, the largest block in fp32 twice, and what waiting batches hold."""
    blocks = [sum(4 * one.shape[0] * one.shape[1] for one in block.linears) for block in structure.blocks]
    widest = max((max(one.shape) for block in structure.blocks for one in block.linears), default=0)
    rest = max((info.nbytes for info in checkpoint.tensors.values()), default=0)
    needed = BASE_BYTES + 2 * max(blocks, default=0) + rest + 12 * widest * widest
    if needs_data:
        tokens = recipe.calibration.samples * recipe.calibration.seq_len
        device = torch.device("cpu" if recipe.device == "auto" else recipe.device)
        element = pick_dtype(recipe.dtype, checkpoint, device).itemsize
        width = config.get_text_config().hidden_size
        needed += (
            tokens * element * (6 * width + widest)
            + 12 * recipe.calibration.batch_size * recipe.calibration.seq_len * widest
        )
    return needed


def check_machine(output: Path, *, disk_bytes: int, memory_bytes: int) -> None:
    """Raise MachineError if the disk that `output` needs, or the memory, isn't there."""
    parent = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < disk_bytes:
        raise MachineError(
            f"The output needs {disk_bytes / 1e6:,.1f} MB and {parent} has {free / 1e6:,.1f} MB free: "
            "make room, or name another place with --output."
        )
    available = psutil.virtual_memory().available
    if available < memory_bytes:
        raise MachineError(
            f"This needs about {memory_bytes / 1e6:,.0f} MB of memory and {available / 1e6:,.0f} MB are free: "
            "lower --samples, --seq-len or --batch-size, or free memory."
        )
