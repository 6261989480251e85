"""What an output folder is called when nobody named it."""

from __future__ import annotations

import re
from pathlib import Path

from .schema import Recipe


def default_output(model: str, recipe: Recipe) -> Path:
    """A folder in the current one, after model, methods and bits: `SmolLM2-135M-Instruct-gptq-4bit`."""
    return Path("-".join([model_name(model), *(stage.settings.label for stage in recipe.stages)]))


def export_output(model: Path, format: str) -> Path:
    """The folder of an export, beside the model's: `SmolLM2-135M-Instruct-gptq-4bit-dense`."""
    return model.with_name(f"{model.name}-{format}")


def model_name(model: str) -> str:
    """The short name of a folder, a hub id, a .gguf file or a snapshot in the hub's cache."""
    path = Path(model)
    if path.name.lower().endswith(".gguf"):
        # The part after the last dot is the file's quantization, as in Name.Q4_1.gguf or Name-Q4_K_M.gguf.
        return re.sub(r"[.-](I?Q\d\w*|F16|F32|BF16)$", "", path.name[: -len(".gguf")], flags=re.IGNORECASE)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.split("--")[-1]
    return path.name if path.name not in ("", ".", "..") else path.resolve().name or "model"
