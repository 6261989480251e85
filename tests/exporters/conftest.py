"""Compressed pico models to be exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modelzip.pipeline import run
from modelzip.pipeline.run import run_recipe
from modelzip.recipes.load import parse_recipe


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
