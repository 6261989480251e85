"""The list `export` of a recipe: read strictly, checked before the run, done at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelzip.checkpoints.errors import OutputError, ProblemsError
from modelzip.checkpoints.index import Checkpoint
from modelzip.pipeline import run
from modelzip.pipeline.run import run_recipe
from modelzip.recipes.load import dump_recipe, parse_recipe


class Told:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, stage: str, done: int, total: int, note: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def recipe(saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(run, "reopen", lambda *arguments, **options: (None, []))

    def of(*exports: Any) -> Any:
        stage = {"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}
        data = {"model": str(saved("llama")), "stages": [stage], "evaluate": {"enabled": False}}
        return parse_recipe({**data, "export": list(exports)}, "test")

    return of


def test_a_run_writes_its_exports_beside_its_output(recipe: Callable[..., Any], tmp_path: Path) -> None:
    exports = ({"format": "dense"}, {"format": "dense", "output": str(tmp_path / "half"), "dtype": "bfloat16"})
    run_recipe(recipe(*exports), output=tmp_path / "small", progress=Told())
    types = [
        {one.dtype for one in Checkpoint.open(str(tmp_path / name)).tensors.values()}
        for name in ("small-dense", "half")
    ]
    assert types == [{"F32"}, {"BF16"}]


def test_a_resumed_run_makes_the_exports_that_are_missing_and_leaves_the_others(
    recipe: Callable[..., Any], tmp_path: Path
) -> None:
    run_recipe(recipe({"format": "dense"}), output=tmp_path / "small", progress=Told())
    before = (tmp_path / "small-dense" / "config.json").stat().st_mtime_ns
    both = recipe({"format": "dense"}, {"format": "dense", "output": str(tmp_path / "other")})
    told = Told()
    run_recipe(both, output=tmp_path / "small", resume=True, progress=told)
    assert (tmp_path / "other" / "config.json").is_file()
    assert (tmp_path / "small-dense" / "config.json").stat().st_mtime_ns == before
    assert any("small-dense is finished already" in line for line in told.lines)


def test_a_folder_that_is_taken_is_refused_before_the_run(recipe: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "small-dense").mkdir()
    (tmp_path / "small-dense" / "config.json").write_text("{}", encoding="utf-8")
    for resume in (False, True):
        with pytest.raises(OutputError, match="small-dense"):
            run_recipe(recipe({"format": "dense"}), output=tmp_path / "small", resume=resume, progress=Told())
    assert not (tmp_path / "small").exists()
    with pytest.raises(ProblemsError, match="two outputs"):
        run_recipe(recipe({"format": "dense", "output": str(tmp_path / "x")}), output=tmp_path / "x", progress=Told())


def test_what_no_plain_checkpoint_can_hold_is_refused_before_the_run(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """BERT's config.json can't say that fewer heads of the same size are left."""
    stage = {"prune": {"method": "heads", "share": 0.5}}
    data = {"model": str(saved("bert-classifier")), "stages": [stage], "evaluate": {"enabled": False}}
    data |= {"calibration": {"samples": 2, "seq_len": 8}, "export": [{"format": "dense"}]}
    with pytest.raises(ProblemsError, match=r"query is \[16, 32\], which isn't what config.json asks for"):
        run_recipe(parse_recipe(data, "test"), output=tmp_path / "out", progress=Told())
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_read_strictly_and_written_back(recipe: Callable[..., Any]) -> None:
    with pytest.raises(ProblemsError) as found:
        recipe({"format": "guff"}, {"formt": "dense"}, "dense")
    told = "\n".join(found.value.sentences)
    for words in ("export[0].format: guff is not allowed; it must be dense", "export[1].formt: ", "export[2]: dense"):
        assert words in told
    with pytest.raises(ProblemsError, match=r"export\[0\]: scheme is Q9, but gguf takes auto, F32"):
        recipe({"format": "gguf", "scheme": "Q9"})
    with pytest.raises(ProblemsError, match=r"export\[0\]: dtype is float16, but onnx has no dtype to choose"):
        recipe({"format": "onnx", "dtype": "float16"})
    written = recipe({"format": "dense", "dtype": "bfloat16", "verify": False})
    assert parse_recipe(yaml.safe_load(dump_recipe(written)), "again") == written
