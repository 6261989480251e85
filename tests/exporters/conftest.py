"""Compressed pico models to be exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    """compressed("llama", bits=3) -> that pico model quantized by rtn, not reopened, with a README beside it."""
    made: dict[str, Path] = {}

    def of(family: str, **settings: Any) -> Path:
        key = f"{family} {settings}"
        if key not in made:
            folder = tmp_path_factory.mktemp("compressed") / "model"
            stage = {"quantize": {"method": "rtn", "group_size": 16, **settings}}
            recipe = {"model": str(saved(family)), "stages": [stage], "evaluate": {"enabled": False}}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(run, "reopen", lambda *arguments, **options: (None, []))
                run_recipe(parse_recipe(recipe, "test"), output=folder, progress=Silent())
            (folder / "README.md").write_text("# Small\n", encoding="utf-8")
            made[key] = folder
        return made[key]

    return of
