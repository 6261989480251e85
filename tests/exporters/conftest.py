"""Compressed pico models to be exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelzip.checkpoints.index import Checkpoint
from modelzip.exporters.source import Source
from modelzip.pipeline import run
from modelzip.pipeline.run import run_recipe
from modelzip.recipes.load import parse_recipe
from modelzip.weights import Affine


class Silent:
    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        pass


@pytest.fixture(scope="session")
def compressed(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """compressed("llama", bits=3) -> that pico model, or its like in `source`, quantized by rtn or else compressed by
    the stage `verb`, not reopened, with a README beside it."""
    made: dict[str, Path] = {}

    def of(family: str, source: Path | None = None, verb: str = "quantize", **settings: Any) -> Path:
        key = f"{source or family} {verb} {settings}"
        if key not in made:
            folder = tmp_path_factory.mktemp("compressed") / "model"
            rounding = {"method": "rtn", "group_size": 16} if verb == "quantize" else {}
            stage = {verb: {**rounding, **settings}}
            recipe = {"model": str(source or saved(family)), "stages": [stage], "evaluate": {"enabled": False}}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(run, "reopen", lambda *arguments, **options: (None, []))
                run_recipe(parse_recipe(recipe, "test"), output=folder, progress=Silent())
            (folder / "README.md").write_text("# Small\n", encoding="utf-8")
            made[key] = folder
        return made[key]

    return of


@pytest.fixture(scope="session")
def wide(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """wide("llama", dtype=...) -> a pico model twice as wide as that of `saved`: formats have their least widths."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def of(family: str, dtype: torch.dtype = torch.float16) -> Path:
        if (family, dtype) not in made:
            folder = made[family, dtype] = tmp_path_factory.mktemp("wide")
            plain = {"hidden_size": 64, "intermediate_size": 128}
            others = {"gpt2": {"n_embd": 64}, "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128}}
            models.FAMILIES[family].build(**others.get(family, plain)).to(dtype).save_pretrained(folder)
        return made[family, dtype]

    return of


@pytest.fixture(scope="session")
def tensors_of() -> Callable[[Path], dict[str, Tensor]]:
    """tensors_of(folder) -> all that a checkpoint holds, by name."""

    def read(folder: Path) -> dict[str, Tensor]:
        checkpoint = Checkpoint.open(str(folder))
        return checkpoint.read(checkpoint.tensors)

    return read


@pytest.fixture(scope="session")
def config_of() -> Callable[[Path], dict[str, Any]]:
    """config_of(folder) -> its quantization_config."""
    return lambda folder: json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]


@pytest.fixture(scope="session")
def affine_of() -> Callable[[Path], dict[str, Affine]]:
    """affine_of(folder) -> every weight that a modelzip checkpoint holds as integers, by module."""

    def read(folder: Path) -> dict[str, Affine]:
        source = Source.of(Checkpoint.open(str(folder)))
        found = {name: source.weight(name) for name in source.matrices()}
        return {name: weight for name, weight in found.items() if isinstance(weight, Affine)}

    return read
